//! What the commands do.

mod ask;
mod events;
mod image;
mod import;
mod job;
mod libvirt;
mod location;
mod log;
mod map;
mod meta;
mod migrate;
mod node;
mod plan;
mod policy;
mod recover;
mod replay;
mod scrub;
mod status;
mod step;
mod top;
mod verify;
mod watch;
mod why;

use crate::Outcome;
use crate::cli::{Cli, Global, Noun};
use crate::cluster::Cluster;
use crate::output::Output;

/// What every command works with.
#[derive(Debug, Clone)]
pub struct Context {
    /// The options of every command.
    pub global: Global,
    /// Where data goes.
    pub out: Output,
}

impl Context {
    /// A connection.
    ///
    /// # Errors
    /// As [`Cluster::connect`].
    pub async fn cluster(&self) -> Outcome<Cluster> {
        Cluster::connect(&self.global).await
    }
}

/// Does what the command line says.
///
/// # Errors
/// Whatever went wrong, with its exit code.
pub async fn run(cli: Cli) -> Outcome {
    let context = Context {
        out: Output {
            format: cli.global.output,
            ascii: cli.global.ascii,
        },
        global: cli.global,
    };
    match cli.noun {
        Noun::Image(verb) => image::run(&context, verb).await,
        Noun::Location(verb) => location::run(&context, verb).await,
        Noun::Node(verb) => node::run(&context, verb).await,
        Noun::Migrate(options) => migrate::run(&context, options).await,
        Noun::LibvirtHook(options) => libvirt::run(&context, options).await,
        Noun::Job(verb) => job::run(&context, verb).await,
        Noun::Status(options) => status::status(&context, &options).await,
        Noun::Health(options) => status::health(&context, &options).await,
        Noun::Log(verb) => log::run(&context, verb).await,
        Noun::Why(options) => why::run(&context, options).await,
        Noun::Replay(options) => replay::run(&context, &options).await,
        Noun::Policy(verb) => policy::run(&context, verb).await,
        Noun::Top(options) => top::run(&context, &options).await,
        Noun::Completions { shell } => {
            meta::completions(shell);
            Ok(())
        }
        Noun::Man { dir } => meta::man(dir.as_deref()),
    }
}
