//! The command line: nouns, verbs and options.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hearth_protocol::limits::REPLICAS_MAX;
use hearth_protocol::rpc::Pace;
use hearth_protocol::{BlockIndex, ByteLen, ImageName, NodeId, units};

use crate::moment::Moment;
use crate::names::{BlockOf, ImageAt, MaybeAt, Setting};
use crate::output::Format;

const AFTER: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 not supported, 5 refused by a safety rule, \
6 conflict, 7 still running, 20 cannot connect, 21 no answer in time.

Sizes take IEC units (64KiB or 64K, 4GiB), times are RFC 3339, `-5m` for five minutes ago, or a log position.";

/// Hearth keeps VMs' hot blocks in RAM and says why
#[derive(Debug, Parser)]
#[command(name = "hearth", version, after_help = AFTER, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub noun: Noun,
}

/// Options of every command
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// NATS servers, separated by commas
    #[arg(
        long,
        global = true,
        env = "HEARTH_NATS",
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL",
        help_heading = "Options of every command"
    )]
    pub nats: String,
    /// NATS credentials file
    #[arg(
        long,
        global = true,
        env = "HEARTH_NATS_CREDENTIALS",
        value_name = "FILE",
        help_heading = "Options of every command"
    )]
    pub nats_credentials: Option<PathBuf>,
    /// Longest wait for an answer
    #[arg(long, global = true, default_value = "10s", value_parser = humantime::parse_duration, value_name = "TIME", help_heading = "Options of every command")]
    pub timeout: Duration,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", help_heading = "Options of every command")]
    pub output: Format,
    /// Print only ASCII characters
    #[arg(long, global = true, help_heading = "Options of every command")]
    pub ascii: bool,
}

/// What a command is about
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Virtual disks
    #[command(subcommand, visible_alias = "img")]
    Image(Image),
    /// The nodes that hold an image
    #[command(subcommand, visible_alias = "loc")]
    Location(Location),
    /// The machines that serve them
    #[command(subcommand)]
    Node(Node),
    /// Migrates a running QEMU guest to another node, and its disks with it
    Migrate(Migrate),
    /// Has a guest's disks where libvirt is about to start it; for /etc/libvirt/hooks/qemu
    LibvirtHook(LibvirtHook),
    /// Long operations on a node
    #[command(subcommand)]
    Job(Job),
    /// The cluster at a glance
    #[command(visible_alias = "st")]
    Status(Status),
    /// What is wrong, and what to do
    Health(Health),
    /// The event log
    #[command(subcommand)]
    Log(Log),
    /// Why a block is where it is: heat, rule and numbers, command, result, what lost
    Why(Why),
    /// The cluster as of a time, folded anew from the log, with its digest
    Replay(Replay),
    /// The rules that decide
    #[command(subcommand)]
    Policy(Policy),
    /// The dashboard
    Top(Top),
    /// Completions for a shell, to be sourced
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The manual page, or all pages into a folder
    Man {
        /// Writes one page per command here
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// Which node
#[derive(Debug, Clone, Args)]
pub struct OnNode {
    /// The node [default: the image's node, or the only one]
    #[arg(long, value_name = "NODE")]
    pub node: Option<NodeId>,
}

/// How a job goes through an image
#[derive(Debug, Clone, Args)]
pub struct Throttle {
    /// Only these blocks, such as 0-1023
    #[arg(long, value_parser = blocks, value_name = "FIRST-LAST")]
    pub blocks: Option<(BlockIndex, BlockIndex)>,
    /// Bytes of the image a second, at most
    #[arg(long, default_value = "64MiB", value_parser = rate, value_name = "SIZE")]
    pub rate: ByteLen,
    /// Does not wait for the end
    #[arg(long)]
    pub detach: bool,
}

/// Options of every change
#[derive(Debug, Clone, Args)]
pub struct Change {
    /// Prints what would be asked of whom, and does nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Why, for the log
    #[arg(long, default_value = "", hide_default_value = true, value_parser = reason, value_name = "TEXT")]
    pub reason: String,
}

fn reason(text: &str) -> Result<String, String> {
    let max = hearth_protocol::limits::REASON_BYTES_MAX;
    if text.len() > max {
        Err(format!("it has {} bytes, at most {max} go into the log", text.len()))
    } else {
        Ok(text.to_owned())
    }
}

fn block_size(text: &str) -> Result<ByteLen, String> {
    let len: ByteLen = text
        .parse()
        .map_err(|e: hearth_protocol::size::SizeError| e.to_string())?;
    if units::is_block_size(len.0) {
        Ok(len)
    } else {
        Err("use a power of two from 4KiB to 4MiB".into())
    }
}

fn pace(text: &str) -> Result<Pace, String> {
    match text {
        "gentle" => Ok(Pace::Gentle),
        "full" => Ok(Pace::Full),
        rate => match rate.parse::<ByteLen>() {
            Ok(rate) => Ok(Pace::AtMost(rate)),
            Err(_) => Err("say gentle, full, or bytes per second such as 50MiB".into()),
        },
    }
}

fn blocks(text: &str) -> Result<(BlockIndex, BlockIndex), String> {
    let number = |text: &str| text.trim().parse().map(BlockIndex);
    let parts = text.split_once('-').unwrap_or((text, text));
    match (number(parts.0), number(parts.1)) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err("use the first and the last block, such as 0-1023".into()),
    }
}

fn rate(text: &str) -> Result<ByteLen, String> {
    let rate: ByteLen = text
        .parse()
        .map_err(|e: hearth_protocol::size::SizeError| e.to_string())?;
    match rate.0 {
        0 => Err("use 1 byte a second or more".into()),
        _ => Ok(rate),
    }
}

fn fault_domain(text: &str) -> Result<String, String> {
    let max = hearth_protocol::limits::FAULT_DOMAIN_BYTES_MAX;
    if text.len() > max || text.chars().any(char::is_control) {
        Err(format!("use a name of at most {max} bytes"))
    } else {
        Ok(text.to_owned())
    }
}

fn image_size(text: &str) -> Result<ByteLen, String> {
    let len: ByteLen = text
        .parse()
        .map_err(|e: hearth_protocol::size::SizeError| e.to_string())?;
    let max = hearth_protocol::limits::IMAGE_BYTES_MAX;
    if len.0 > 0 && len.0.is_multiple_of(4096) && len.0 <= max {
        Ok(len)
    } else {
        Err(format!("use a multiple of 4KiB up to {}", ByteLen(max).iec()))
    }
}

/// What libvirt tells its hook
#[derive(Debug, Args)]
#[command(
    after_help = "The whole hook, executable as /etc/libvirt/hooks/qemu:\n\n  #!/bin/sh\n  exec hearth libvirt-hook --node NODE -- \
\"$@\"\n\nprepare begin attaches the guest's images on this node, migrate begin attaches them --incoming, release end detaches them. A \
disk is an image if its source is this node's NBD socket, or a kernel device of Hearth. Migrating hands the disks over while \
`hearth migrate --listen` listens to the source's QEMU."
)]
pub struct LibvirtHook {
    /// The node that libvirt runs on
    #[arg(long, env = "HEARTH_NODE", value_name = "NODE")]
    pub node: NodeId,
    /// Where links to Hearth's kernel devices are
    #[arg(long, default_value = "/dev/hearth", value_name = "DIR")]
    pub devices: PathBuf,
    /// The guest
    pub guest: String,
    /// prepare, start, started, stopped, release, migrate, …
    pub operation: String,
    /// begin or end
    pub part: String,
    /// Whatever else libvirt says
    #[arg(allow_hyphen_values = true)]
    pub more: Vec<String>,
}

/// Operations on the locations of an image with replicas
#[derive(Debug, Subcommand)]
pub enum Location {
    /// Which nodes hold which blocks, and who is being synced
    #[command(visible_alias = "ls")]
    List {
        /// The image
        image: ImageName,
        #[command(flatten)]
        on: OnNode,
    },
    /// Has one more node hold the image: it is synced while the guest goes on, and counts when it has everything
    Add {
        /// The image
        image: ImageName,
        /// The node to add
        location: NodeId,
        /// Only these blocks, such as 0-1023
        #[arg(long, value_parser = blocks, value_name = "FIRST-LAST")]
        blocks: Option<(BlockIndex, BlockIndex)>,
        /// How fast: gentle (so that the guest does not feel it), full, or bytes per second such as 50MiB
        #[arg(long, value_parser = pace, value_name = "RATE", default_value = "gentle")]
        pace: Pace,
        /// Does not wait for the end
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Deletes a node's copy; refused if it is the last one of any block
    #[command(
        visible_alias = "rm",
        after_help = "The image is still to have as many replicas as before: left with fewer, it gets another one after \
the repair policy's grace time. To have fewer for good: hearth image set IMAGE --replicas N"
    )]
    Remove {
        /// The image
        image: ImageName,
        /// The node to remove
        location: NodeId,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
}

/// Operations on images
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Makes an empty image
    #[command(visible_alias = "new")]
    Create {
        /// Its name, project/name
        image: ImageName,
        /// Its size, such as 4GiB
        #[arg(value_name = "SIZE", value_parser = image_size, required_unless_present = "size")]
        size_at: Option<ByteLen>,
        /// Its size, such as 4GiB
        #[arg(long, value_parser = image_size, conflicts_with = "size_at")]
        size: Option<ByteLen>,
        /// Its block size
        #[arg(long, default_value = "64KiB", value_parser = block_size, value_name = "SIZE")]
        block_size: ByteLen,
        /// Nodes that hold it; writes go to all of them
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=REPLICAS_MAX), value_name = "N")]
        replicas: u64,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Makes an image from a raw file on the node
    Import {
        /// The raw file, as the node sees it
        file: String,
        /// The image's name, project/name
        image: String,
        /// Its block size
        #[arg(long, default_value = "64KiB", value_parser = block_size, value_name = "SIZE")]
        block_size: ByteLen,
        /// Does not wait for the end
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Makes images on top of a snapshot; they take no space
    #[command(after_help = "Fifty at once, with the shell's braces: hearth image clone masters/os@v1 appl/vm-{1..50}")]
    Clone {
        /// The snapshot, project/name@snapshot
        source: ImageAt,
        /// The clones' names, project/name
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Seals what an image holds under a name
    #[command(visible_alias = "snap")]
    Snapshot {
        /// The image and the snapshot's name, project/name@snapshot
        snapshot: ImageAt,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Makes an image larger
    #[command(
        after_help = "A guest sees the new size when it connects anew: restart the VM, or attach the disk to it \
again. An image attached as a kernel device is detached first. Images cannot shrink. The partition table and file \
systems in it are grown in the guest."
    )]
    Resize {
        /// The image
        image: ImageName,
        /// Its new size, such as 8GiB
        #[arg(value_name = "SIZE", value_parser = image_size)]
        size: ByteLen,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Sets how many nodes hold an image with replicas, while its guest goes on
    #[command(
        after_help = "More: the scheduler has other nodes hold it at once. Fewer: it has those dropped that are \
missed least, one after the other, never the owner's. Both need the image attached."
    )]
    Set {
        /// The image
        image: ImageName,
        /// Nodes that hold it
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..=REPLICAS_MAX), value_name = "N")]
        replicas: u64,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Copies a snapshot, or an image that is not attached, into a file on the node
    #[command(
        after_help = "The file appears under its name when it is complete. Ctrl-C leaves the job running; \
`hearth job cancel` stops it and removes what it wrote."
    )]
    Export {
        /// The image, or project/name@snapshot
        #[arg(value_name = "IMAGE[@SNAPSHOT]")]
        source: MaybeAt,
        /// The file, an absolute path on the node
        file: String,
        /// The file's format
        #[arg(long, value_enum, default_value_t = FileFormat::Raw, value_name = "FORMAT")]
        format: FileFormat,
        /// Replaces a file that exists
        #[arg(long)]
        force: bool,
        /// Does not wait for the end
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Deletes images for ever; refused while they are attached or have clones
    #[command(visible_alias = "rm")]
    Delete {
        /// The images
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
        /// Does not ask
        #[arg(short, long)]
        yes: bool,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// All images
    #[command(visible_alias = "ls")]
    List {
        /// Only of this node, asked of the node itself
        #[arg(long, value_name = "NODE")]
        node: Option<NodeId>,
        #[command(flatten)]
        watch: Watch,
    },
    /// Everything about one image
    #[command(visible_alias = "info")]
    Show {
        /// The image
        image: ImageName,
        #[command(flatten)]
        on: OnNode,
    },
    /// Starts serving images on their node
    #[command(
        after_help = "Where every node with the newest copy is gone for good, --takeover --accept-data-loss starts from an \
older one. Make sure first that those nodes are off, or their guests go on writing what nobody keeps. When they come back, \
they serve nothing and are synced anew. The log says which copy was taken, and which one was known."
    )]
    Attach {
        /// The images
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
        /// `socket` for NBD only, `device` for a kernel block device as well
        #[arg(long, value_enum, default_value_t = Export::Socket, value_name = "KIND")]
        export: Export,
        /// The same as --export device
        #[arg(long, conflicts_with = "export")]
        device: bool,
        /// Takes an image with replicas over from a node that the log says owns it: that node is fenced off
        #[arg(long, requires = "node")]
        takeover: bool,
        /// With --takeover: takes this node's copy though it may lack what was written last, and GIVES THAT UP for good.
        /// Refused while a newer copy can be reached
        #[arg(long, requires = "takeover")]
        accept_data_loss: bool,
        /// Does not ask
        #[arg(short, long, requires = "accept_data_loss")]
        yes: bool,
        /// As the destination of a live migration: reads go through to the owner, writes wait until it has handed over
        #[arg(long, requires = "node", conflicts_with = "takeover")]
        incoming: bool,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Stops serving them
    Detach {
        /// The images
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Hands an image over to the node that attached it --incoming
    #[command(
        after_help = "For a live migration: attach the image --incoming on the destination, start QEMU there with \
-incoming, migrate with the capability pause-before-switchover, and hand over when the source is in the state \
pre-switchover; then let it go on with migrate-continue."
    )]
    HandOver {
        /// The image
        image: ImageName,
        /// The destination
        #[arg(long, value_name = "NODE")]
        to: NodeId,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Brings into a node's RAM what the image's owner has in RAM, before a hand-over to that node
    Prewarm {
        /// The image
        image: ImageName,
        /// The node
        #[arg(long, value_name = "NODE")]
        node: NodeId,
        /// Does not wait for the end
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Where its blocks are: the nodes that hold them, and of an image without replicas the layer and the tier
    #[command(
        after_help = "With --blocks, block by block; as JSON {name, size, block_size, blocks: [{index, locations: [{node, \
synced}]}]}, up to 65536 blocks at a time: --blocks 65536-131071 shows the next ones."
    )]
    Map {
        /// The image
        image: ImageName,
        /// Block by block, all of them or these, such as 0-1023
        #[arg(long, value_parser = blocks, value_name = "FIRST-LAST", num_args = 0..=1, conflicts_with = "tiers")]
        blocks: Option<Option<(BlockIndex, BlockIndex)>>,
        /// The layer and the tier on one node, also of an image with replicas
        #[arg(long)]
        tiers: bool,
        #[command(flatten)]
        on: OnNode,
    },
    /// Compares the replicas of an image while its guest goes on, and repairs blocks that differ
    #[command(
        after_help = "The copy that counts is the one that the guest reads: that of the node it is attached on, unless its \
disk cannot read the block. Writes of the guest to the blocks being compared wait, a mebibyte at a time. What was found is \
in the job and in the log (hearth log list --kind copies_checked).\n\n\
Exit code 1 if blocks differ and were not repaired. Ctrl-C leaves the job running; hearth job pause, resume and cancel."
    )]
    Scrub {
        /// The image
        image: ImageName,
        /// Only reports differences
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        throttle: Throttle,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Writes the replicas of blocks anew from the copy that the guest reads, while the guest goes on
    #[command(
        after_help = "The same as the repair of hearth image scrub, without a comparison first, so it writes every block \
named. No node leaves the set for it. To have a node hold blocks that it does not hold yet: hearth location add."
    )]
    Sync {
        /// The image
        image: ImageName,
        /// Only the copy on this node
        #[arg(long, value_name = "NODE")]
        node: Option<NodeId>,
        #[command(flatten)]
        throttle: Throttle,
        #[command(flatten)]
        change: Change,
    },
    /// How a guest gets the disk: a snippet for its configuration
    AttachInfo {
        /// The image
        image: ImageName,
        /// For whom
        #[arg(long, value_enum, default_value_t = Guest::Qemu, value_name = "GUEST")]
        format: Guest,
        #[command(flatten)]
        on: OnNode,
    },
}

/// Options of `migrate`
#[derive(Debug, Args)]
#[command(
    after_help = "First attach the disks on the destination with --incoming, and start QEMU there as at the source, with \
-incoming defer. Both QEMUs need a monitor: -qmp unix:PATH,server=on,wait=off (for one on another machine, forward its \
socket, as with ssh -L). Ctrl-C cancels the migration, and the guest goes on at its source; once the disks are handed over \
it goes on to its end.\n\n\
With --listen somebody else migrates the guest, such as libvirt, and this command hands the disks over when the guest \
stands still; give the source's QEMU a second monitor for it."
)]
pub struct Migrate {
    /// The guest's disks
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<ImageName>,
    /// The destination
    #[arg(long, value_name = "NODE")]
    pub to: NodeId,
    /// The monitor of the source's QEMU
    #[arg(long, value_name = "SOCKET")]
    pub source_qmp: PathBuf,
    /// The monitor of the destination's QEMU
    #[arg(long, value_name = "SOCKET", required_unless_present = "listen")]
    pub destination_qmp: Option<PathBuf>,
    /// How the guest's memory travels, as QEMU takes it: tcp:HOST:PORT, or unix:PATH on one machine
    #[arg(long, value_name = "URI", required_unless_present = "listen")]
    pub channel: Option<String>,
    /// Does not bring what the source has in RAM into the destination's RAM first
    #[arg(long)]
    pub no_prewarm: bool,
    /// Only hands the disks over, when somebody else migrates the guest
    #[arg(long, conflicts_with_all = ["destination_qmp", "channel"])]
    pub listen: bool,
    #[command(flatten)]
    pub change: Change,
}

/// How an image is served
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Export {
    /// NBD on the node's unix socket
    Socket,
    /// NBD and a kernel block device
    Device,
}

/// Format of an exported file
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// The disk's bytes; zeros take no space
    Raw,
    /// QEMU's qcow2
    Qcow2,
}

/// Who uses the disk
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// QEMU's command line
    Qemu,
    /// A libvirt domain
    Libvirt,
    /// Proxmox VE
    Pve,
}

/// Operations on nodes
#[derive(Debug, Subcommand)]
pub enum Node {
    /// All nodes
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        watch: Watch,
    },
    /// Everything about one node
    #[command(visible_alias = "info")]
    Show {
        /// The node [default: the only one]
        node: Option<NodeId>,
    },
    /// Empties a node: it gets nothing new, and the replicas there are moved away
    #[command(
        after_help = "Images whose guests run on the node, and images without a copy elsewhere, stay: hearth node \
ok-to-stop says what to do for each. The drain is in the log, so it outlives restarts; hearth node undrain ends it."
    )]
    Drain {
        /// The node
        node: NodeId,
        #[command(flatten)]
        change: Change,
    },
    /// Has a node take images and replicas again; moves under way are finished
    Undrain {
        /// The node
        node: NodeId,
        #[command(flatten)]
        change: Change,
    },
    /// Whether a node can be stopped without harm to an image; exit code 5 if it cannot
    OkToStop {
        /// The node
        node: NodeId,
    },
    /// Sets what operators say of a node
    Set {
        /// The node
        node: NodeId,
        /// Its fault domain, such as a rack; empty for what the node's own configuration says
        #[arg(long, value_name = "NAME", value_parser = fault_domain)]
        fault_domain: String,
        #[command(flatten)]
        change: Change,
    },
}

/// Operations on jobs
#[derive(Debug, Subcommand)]
pub enum Job {
    /// How far a job is; exit code 7 while it runs
    Show {
        /// Its number, printed when it started
        job: u64,
        /// Waits for the end and shows progress
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        on: OnNode,
    },
    /// The jobs of all nodes, the newest first
    #[command(visible_alias = "ls")]
    List {
        /// Only of this node
        #[arg(long, value_name = "NODE")]
        node: Option<NodeId>,
        /// Also those that have ended
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        watch: Watch,
    },
    /// Has a job stand still until it is resumed
    #[command(
        after_help = "A join (hearth location add) copies nothing while it is paused; the guest's writes still go to the \
joining node, so that nothing has to be copied twice."
    )]
    Pause {
        /// Its number
        job: u64,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Has a paused job go on
    Resume {
        /// Its number
        job: u64,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
    /// Stops a job; a file or an image that it was making is removed
    Cancel {
        /// Its number
        job: u64,
        #[command(flatten)]
        on: OnNode,
        #[command(flatten)]
        change: Change,
    },
}

/// Looking again and again
#[derive(Debug, Clone, Copy, Args)]
pub struct Watch {
    /// Prints again and again, each time after this long [default: 2s]
    #[arg(short, long, value_parser = humantime::parse_duration, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s")]
    pub watch: Option<Duration>,
}

/// Options of `status`
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    pub watch: Watch,
}

/// Options of `health`
#[derive(Debug, Args)]
pub struct Health {
    #[command(flatten)]
    pub watch: Watch,
    /// Says what to do as well
    #[arg(long)]
    pub detail: bool,
}

/// Where the log is read
#[derive(Debug, Clone, Args)]
pub struct From {
    /// Reads a scheduler's event log in this folder (also while it runs) instead of the stream
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
}

/// Operations on the log
#[derive(Debug, Subcommand)]
pub enum Log {
    /// The newest events, and those to come
    Tail {
        /// How many of the newest
        #[arg(short = 'n', long, default_value_t = 20, value_name = "COUNT")]
        lines: u64,
        /// Stops there, does not wait for more
        #[arg(long)]
        no_follow: bool,
        #[command(flatten)]
        only: Only,
    },
    /// Events between two moments
    #[command(visible_alias = "ls")]
    List {
        /// From here on [default: the newest 50]
        #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
        since: Option<Moment>,
        /// Up to here
        #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
        until: Option<Moment>,
        /// At most so many
        #[arg(long, value_name = "COUNT")]
        limit: Option<usize>,
        #[command(flatten)]
        only: Only,
        #[command(flatten)]
        from: From,
    },
    /// Everything in one event
    Show {
        /// Its log position
        seq: u64,
        #[command(flatten)]
        from: From,
    },
    /// Checks contiguity and the hash chain, and derives every decision and digest again
    Verify {
        /// Holds it against what a node has seen (the file log-witness.json in its store); repeat for several
        #[arg(long, value_name = "FILE")]
        witness: Vec<PathBuf>,
        #[command(flatten)]
        from: From,
    },
    /// Puts back what the stream lost at its end, or all of a stream that is gone, from a scheduler's event log, and
    /// writes that down in the log
    Recover {
        /// The scheduler's event log in this folder
        #[arg(long, value_name = "DIR")]
        log_dir: PathBuf,
        /// Accepts the stream as it is, where it went on with other messages than this log holds: those of the log
        /// from the first difference on count no more. See what is lost with --dry-run first
        #[arg(long)]
        accept_loss: bool,
        /// Copies of the stream, if it is gone and is made anew
        #[arg(long, value_name = "COUNT", default_value_t = 3)]
        replicas: u8,
        #[command(flatten)]
        change: Change,
    },
}

/// Which events
#[derive(Debug, Clone, Default, Args)]
pub struct Only {
    /// Of these kinds, such as command_given
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub kind: Vec<String>,
    /// About this image
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<ImageName>,
    /// By or for this node
    #[arg(long, value_name = "NODE")]
    pub node: Option<NodeId>,
}

/// Options of `why`
#[derive(Debug, Args)]
pub struct Why {
    /// The image and the block's number, project/name:block
    pub block: BlockOf,
    /// As of this time or log position
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    pub at: Option<Moment>,
    #[command(flatten)]
    pub from: From,
}

/// Options of `replay`
#[derive(Debug, Args)]
pub struct Replay {
    /// As of this time or log position [default: the end of the log]
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    pub at: Option<Moment>,
    #[command(flatten)]
    pub from: From,
}

/// Operations on policies
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// The policy in force, and what moves of replicas won and cost
    Show,
    /// Changes the tier policy
    Set {
        /// What to change, such as threshold_bursts=3; sizes take IEC units
        #[arg(required = true, value_name = "NAME=VALUE")]
        settings: Vec<Setting>,
        #[command(flatten)]
        change: Change,
    },
}

/// Options of `top`
#[derive(Debug, Args)]
pub struct Top {
    /// Prints text instead of using the terminal
    #[arg(short, long)]
    pub batch: bool,
    /// Prints so many times, then ends [default: for ever]
    #[arg(short = 'n', long, value_name = "COUNT", requires = "batch")]
    pub iterations: Option<u64>,
    /// Time between two looks
    #[arg(short, long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub delay: Duration,
}
