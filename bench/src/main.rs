//! Benchmarks against named peers: Hearth and the peers in turn, in one run, with the spread.

mod moves;
mod nbd;
mod policy;
mod replicas;
mod report;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Benchmarks Hearth against named peers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The data path: reads and writes over NBD and through a kernel block device, against nbdkit and QEMU
    Nbd(nbd::Options),
    /// Hit ratios of the RAM tier over recorded block traces, beside other policies
    Policy(policy::Options),
    /// What a guest feels of copies to another node, and how fast those are, beside nbdcopy
    Moves(moves::Options),
    /// An image with two replicas beside a file on another node, over NFS and over NBD
    Replicas(replicas::Options),
    /// A server that `nbd` measures
    #[command(hide = true)]
    Serve {
        /// Size of the disk, bytes
        size_bytes: u64,
        #[command(subcommand)]
        what: nbd::serve::What,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Nbd(options) => nbd::run(&options),
        What::Policy(options) => policy::run(&options),
        What::Moves(options) => moves::run(&options),
        What::Replicas(options) => replicas::run(&options),
        What::Serve { size_bytes, what } => nbd::serve::run(what, size_bytes),
    }
}
