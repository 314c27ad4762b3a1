//! Every bound that two processes must agree on, with its reason.

/// Blocks of one image and layer in one heat report. Keeps a report under the message limit below: 13 bytes a
/// record at the worst, some 200 KiB.
pub const HEAT_RECORDS_PER_REPORT_MAX: usize = 16_384;

/// Largest message that Hearth publishes, in bytes. nats-server refuses more than 1 MiB unless told otherwise.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Longest text that an operator may give as the reason for a change, in bytes.
pub const REASON_BYTES_MAX: usize = 1_024;

/// Blocks that one promote or demote command names: bounded so that a command finishes within a tick or two.
pub const BLOCKS_PER_COMMAND_MAX: usize = 1_024;

/// Alternatives that lost, kept in a reason; the best of them come first.
pub const ALTERNATIVES_MAX: usize = 8;

/// Layers in one image's stack: a chain longer than this makes a miss look in too many places.
pub const LAYERS_PER_IMAGE_MAX: usize = 64;

/// Decisions that a cluster view carries, newest last.
pub const DECISIONS_IN_VIEW_MAX: usize = 200;

/// Blocks of one command that a cluster view names; it counts the rest. 200 decisions then stay under half a message.
pub const BLOCKS_IN_VIEW_MAX: usize = 6;

/// Alternatives and seqs of one reason that a cluster view names; the log has them all.
pub const REASONS_IN_VIEW_MAX: usize = 4;

/// Cells that one image's heat view carries, hottest first: some 13 bytes each in JSON, so under a message.
pub const HEAT_CELLS_IN_VIEW_MAX: usize = 60_000;

/// Things wrong that one node tells of, worst first: with their words they fit one message.
pub const NODE_HEALTH_MAX: usize = 200;

/// Images with too few replicas that a cluster view tells of by name, worst first; it counts the rest. With their words
/// they stay under a tenth of a message.
pub const DEGRADED_IN_VIEW_MAX: usize = 200;

/// Nodes that hold one image: every write goes to all of them.
pub const REPLICAS_MAX: u64 = 8;

/// Longest name of a fault domain, in bytes.
pub const FAULT_DOMAIN_BYTES_MAX: usize = 63;

/// Images that one answer about a node names, the most serious first; it counts the rest.
pub const IMAGES_OF_NODE_MAX: usize = 500;

/// Largest image, in bytes (16 TiB): 2^28 blocks of 64 KiB keeps a validity bitmap under 32 MiB.
pub const IMAGE_BYTES_MAX: u64 = 16 << 40;

/// Milliseconds between two ticks of the scheduler and between two heat reports of a node.
pub const TICK_MS: u64 = 1_000;

/// Ticks without a report after which a node counts as absent.
pub const ABSENT_AFTER_TICKS: u64 = 5;

/// Blocks that one report about copies names.
pub const DIFFERENCES_NAMED_MAX: usize = 64;
