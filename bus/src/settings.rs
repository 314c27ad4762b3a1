//! What the streams and servers must be set to, and the verdicts on what they are set to.
//!
//! The verdicts are pure functions of what was read back from the server, so that each can be tested by itself.

use async_nats::jetstream::stream::{Config, DiscardPolicy, PersistenceMode, RetentionPolicy, StorageType};
use hearth_protocol::limits::MESSAGE_BYTES_MAX;
use hearth_protocol::subject;
use std::time::Duration;

/// Oldest server that is fit: it compares and publishes over a subject filter
/// (`Nats-Expected-Last-Subject-Sequence-Subject`) with publishes in flight counted, also in a replicated stream, and
/// takes several filters per consumer. 2.9.10 let 281 of 600 races be won twice.
pub const SERVER_VERSION_MIN: (u64, u64, u64) = (2, 12, 0);

/// How long the server recognises a repeated publish. A publisher repeats for seconds; a paused one may take longer.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(300);

/// How long a heat report waits for a leader before it is dropped.
pub const HEAT_AGE_MAX: Duration = Duration::from_secs(60);

/// Bytes of heat reports kept, in memory: half a minute at the cluster's budget of 100,000 records a second.
pub const HEAT_BYTES_MAX: i64 = 64 << 20;

/// Key of the stream's metadata under which its identity stands.
pub(crate) const IDENTITY: &str = "hearth_log";

/// What a scheduler asks of its servers.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Copies of each stream: 3 in production, less only with `dev`.
    pub replicas: usize,
    /// Lets fewer than three replicas and an unsynced or unreadable store pass, as warnings.
    pub dev: bool,
    /// Monitoring addresses (`http://host:port`) of the servers, asked for `sync_interval` if the servers do not
    /// answer `$SYS.REQ.SERVER.PING.VARZ` on this account.
    pub monitors: Vec<String>,
}

/// What one server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// Its name.
    pub name: String,
    /// Its version, such as `2.15.1`.
    pub version: String,
    /// Whether it runs JetStream.
    pub jetstream: bool,
    /// `sync_interval: always`.
    pub sync_always: bool,
}

/// One verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The setting by name, what it is, what it must be, and how to set it.
    pub text: String,
    /// Whether `--dev` lets it pass.
    pub dev_passes: bool,
}

fn never(text: impl Into<String>) -> Finding {
    Finding {
        text: text.into(),
        dev_passes: false,
    }
}

fn unless_dev(text: impl Into<String>) -> Finding {
    Finding {
        text: text.into(),
        dev_passes: true,
    }
}

/// The configuration with which the log's stream is created.
pub(crate) fn log_stream(replicas: usize, identity: String) -> Config {
    Config {
        name: subject::LOG_STREAM.into(),
        description: Some("Hearth's log: the one total order".into()),
        subjects: vec![subject::LOG_ALL.into()],
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        deny_delete: true,
        deny_purge: true,
        num_replicas: replicas,
        max_message_size: i32::try_from(MESSAGE_BYTES_MAX).expect("1 MiB fits"),
        duplicate_window: DUPLICATE_WINDOW,
        metadata: [(IDENTITY.into(), identity)].into(),
        ..Config::default()
    }
}

/// The configuration with which the stream of heat reports is created.
pub(crate) fn heat_stream(replicas: usize) -> Config {
    Config {
        name: subject::HEAT_STREAM.into(),
        description: Some("Hearth's heat reports: bounded, folded into the log at each tick".into()),
        subjects: vec![subject::HEAT_ALL.into()],
        storage: StorageType::Memory,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        num_replicas: replicas,
        max_age: HEAT_AGE_MAX,
        max_bytes: HEAT_BYTES_MAX,
        max_message_size: i32::try_from(MESSAGE_BYTES_MAX).expect("1 MiB fits"),
        duplicate_window: Duration::from_secs(10),
        ..Config::default()
    }
}

/// Judges the log's stream as the server has it.
pub fn judge_log_stream(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut must = |ok: bool, text: String| {
        if !ok {
            found.push(never(text));
        }
    };
    let of = |what: &str| format!("stream HEARTH: {what}");
    must(
        config.storage == StorageType::File,
        of("storage is memory, it must be file: a restart would lose the log"),
    );
    must(
        config.discard == DiscardPolicy::New,
        of("discard is old, it must be new: a full stream would drop its oldest events"),
    );
    must(
        config.deny_delete,
        of("deny_delete is false, it must be true: single events could be deleted"),
    );
    must(
        config.deny_purge,
        of("deny_purge is false, it must be true: the log could be purged"),
    );
    must(
        config.retention == RetentionPolicy::Limits,
        of("retention must be limits: events would go once they are read"),
    );
    must(
        config.max_age.is_zero(),
        of(&format!(
            "max_age is {:?}, it must be 0: events would age out",
            config.max_age
        )),
    );
    must(
        config.max_messages_per_subject <= 0,
        of(&format!(
            "max_msgs_per_subject is {}, it must be -1: older events of an image would go",
            config.max_messages_per_subject
        )),
    );
    must(!config.no_ack, of("no_ack is true, it must be false"));
    must(!config.sealed, of("sealed is true: nothing can be appended"));
    must(
        !config.allow_rollup,
        of("allow_rollup_hdrs is true, it must be false: a message could replace others"),
    );
    must(
        !config.allow_message_ttl,
        of("allow_msg_ttl is true, it must be false: events could age out"),
    );
    must(
        config.persist_mode != Some(PersistenceMode::Async),
        of("persist_mode is async, it must be default: acknowledged events could be lost"),
    );
    must(
        config.mirror.is_none()
            && config.sources.as_ref().is_none_or(Vec::is_empty)
            && config.subject_transform.is_none(),
        of("it mirrors, sources or transforms another stream, it must be the only order of events"),
    );
    must(
        config.subjects == [subject::LOG_ALL],
        of(&format!(
            "subjects are {:?}, they must be {:?}",
            config.subjects,
            [subject::LOG_ALL]
        )),
    );
    must(
        config.duplicate_window >= Duration::from_secs(60),
        of(&format!(
            "duplicate_window is {:?}, it must be at least 60 s: a repeated publish would count twice",
            config.duplicate_window
        )),
    );
    must(
        config.max_message_size <= 0 || config.max_message_size as usize >= MESSAGE_BYTES_MAX,
        of(&format!(
            "max_msg_size is {}, it must be at least {MESSAGE_BYTES_MAX}",
            config.max_message_size
        )),
    );
    must(
        config.metadata.contains_key(IDENTITY),
        of(&format!(
            "metadata has no {IDENTITY}: it was not created by Hearth; rename or remove it"
        )),
    );
    if config.num_replicas < 3 {
        found.push(unless_dev(of(&format!(
            "num_replicas is {}, it must be 3: one server's loss would lose the log",
            config.num_replicas
        ))));
    }
    found
}

/// Judges the stream of heat reports as the server has it.
pub fn judge_heat_stream(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    if config.discard != DiscardPolicy::Old {
        found.push(never(
            "stream HEARTH_HEAT: discard is new, it must be old: a full stream would refuse fresh heat",
        ));
    }
    if config.max_bytes <= 0 {
        found.push(never(
            "stream HEARTH_HEAT: max_bytes is not set: telemetry could fill the server",
        ));
    }
    if config.subjects != [subject::HEAT_ALL] {
        found.push(never(format!(
            "stream HEARTH_HEAT: subjects are {:?}, they must be {:?}",
            config.subjects,
            [subject::HEAT_ALL]
        )));
    }
    found
}

/// Judges the servers. `connected` is the version of the server at the other end of the connection, `peers` the
/// names of those that hold the log's stream (empty without a cluster), `facts` what the servers say of themselves.
pub fn judge_servers(connected: &str, peers: &[String], facts: &[ServerFacts]) -> Vec<Finding> {
    let mut found = Vec::new();
    let (a, b, c) = SERVER_VERSION_MIN;
    let mut version_of = |who: String, version: &str| {
        if parse_version(version).is_none_or(|v| v < SERVER_VERSION_MIN) {
            found.push(never(format!(
                "{who}: version is {version:?}, it must be {a}.{b}.{c} or newer: older ones let a race be won twice"
            )));
        }
    };
    version_of("nats-server".into(), connected);
    for server in facts.iter().filter(|s| s.jetstream) {
        version_of(format!("nats-server {}", server.name), &server.version);
    }
    for server in facts.iter().filter(|s| s.jetstream && !s.sync_always) {
        found.push(unless_dev(format!(
            "nats-server {}: sync_interval is not always: an acknowledged event can be lost with the power; set \
             jetstream {{ sync_interval: always }}",
            server.name
        )));
    }
    let known = |name: &String| facts.iter().any(|s| s.jetstream && &s.name == name);
    let unread: Vec<&String> = peers.iter().filter(|p| !known(p)).collect();
    if !facts.iter().any(|s| s.jetstream) || !unread.is_empty() {
        let whose = if unread.is_empty() {
            String::new()
        } else {
            format!(" of {unread:?}")
        };
        found.push(unless_dev(format!(
            "sync_interval{whose} cannot be read from the server: give its monitoring address with --nats-monitor \
             http://HOST:PORT, or let the account import the service $SYS.REQ.SERVER.PING.VARZ"
        )));
    }
    found
}

fn parse_version(version: &str) -> Option<(u64, u64, u64)> {
    let core = version.split(['-', '+']).next()?;
    let mut parts = core.split('.').map(|p| p.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut Config), names: &str) {
        let mut config = log_stream(3, "x".into());
        change(&mut config);
        let found = judge_log_stream(&config);
        assert_eq!(found.len(), 1, "{names}: {found:?}");
        assert!(found[0].text.contains(names), "{names}: {found:?}");
    }

    #[test]
    fn what_hearth_creates_is_safe() {
        assert_eq!(judge_log_stream(&log_stream(3, "x".into())), []);
        assert_eq!(judge_heat_stream(&heat_stream(3)), []);
    }

    #[test]
    fn every_unsafe_setting_of_the_stream_is_named() {
        check(|c| c.storage = StorageType::Memory, "storage");
        check(|c| c.discard = DiscardPolicy::Old, "discard");
        check(|c| c.deny_delete = false, "deny_delete");
        check(|c| c.deny_purge = false, "deny_purge");
        check(|c| c.retention = RetentionPolicy::Interest, "retention");
        check(|c| c.max_age = Duration::from_secs(9), "max_age");
        check(|c| c.max_messages_per_subject = 4, "max_msgs_per_subject");
        check(|c| c.no_ack = true, "no_ack");
        check(|c| c.sealed = true, "sealed");
        check(|c| c.allow_rollup = true, "allow_rollup_hdrs");
        check(|c| c.allow_message_ttl = true, "allow_msg_ttl");
        check(|c| c.persist_mode = Some(PersistenceMode::Async), "persist_mode");
        check(|c| c.subjects.push("x.>".into()), "subjects");
        check(|c| c.duplicate_window = Duration::from_secs(1), "duplicate_window");
        check(|c| c.max_message_size = 1000, "max_msg_size");
        check(|c| c.metadata.clear(), "metadata");
        check(|c| c.num_replicas = 1, "num_replicas");
    }

    fn server(name: &str, version: &str, sync_always: bool) -> ServerFacts {
        ServerFacts {
            name: name.into(),
            version: version.into(),
            jetstream: true,
            sync_always,
        }
    }

    #[test]
    fn servers_are_judged_by_version_and_sync() {
        let good = server("a", "2.15.1", true);
        assert_eq!(judge_servers("2.15.1", &[], std::slice::from_ref(&good)), []);
        let text = |connected: &str, peers: &[String], facts: &[ServerFacts]| {
            let found = judge_servers(connected, peers, facts);
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        };
        assert!(!text("2.9.10", &[], std::slice::from_ref(&good)).dev_passes);
        assert!(!text("2.15.1", &[], &[server("a", "2.11.9-beta", true)]).dev_passes);
        assert!(!text("nonsense", &[], std::slice::from_ref(&good)).dev_passes);
        assert!(
            text("2.15.1", &[], &[server("a", "2.15.1", false)])
                .text
                .contains("sync_interval")
        );
        assert!(text("2.15.1", &[], &[]).text.contains("cannot be read"));
        assert!(
            text("2.15.1", &["a".into(), "b".into()], &[good])
                .text
                .contains("\"b\"")
        );
    }
}
