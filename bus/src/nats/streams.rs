//! Creating the streams, and reading back what they and their servers are set to.

use async_nats::Client;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config, Info};
use async_nats::jetstream::{Context, ErrorCode};
use hearth_protocol::{Seq, subject};

use super::{unavailable, varz};
use crate::arm::Bounds;
use crate::error::BusError;
use crate::publisher::new_incarnation;
use crate::settings::{self, Wanted};

/// Creates what is missing, then judges everything as the server has it.
pub(super) async fn ensure(client: &Client, jetstream: &Context, wanted: &Wanted) -> Result<Vec<String>, BusError> {
    let facts = varz::read(client, &wanted.monitors).await;
    let version = client.server_info().version;
    // An unfit server is refused before anything is created on it.
    let mut findings = settings::judge_servers(&version, &[], &facts);
    if findings.iter().all(|f| f.dev_passes) {
        let log = ensure_one(
            jetstream,
            settings::log_stream(wanted.replicas, new_incarnation().to_string()),
        )
        .await?;
        let heat = ensure_one(jetstream, settings::heat_stream(wanted.replicas)).await?;
        findings = settings::judge_servers(&version, &peers(&log), &facts);
        findings.extend(settings::judge_log_stream(&log.config));
        findings.extend(settings::judge_heat_stream(&heat.config));
    }
    let (passed, refused): (Vec<_>, Vec<_>) = findings.into_iter().partition(|f| wanted.dev && f.dev_passes);
    if refused.is_empty() {
        Ok(passed.into_iter().map(|f| f.text).collect())
    } else {
        Err(BusError::Unsafe(refused.into_iter().map(|f| f.text).collect()))
    }
}

/// Creates the heat stream again after its server forgot it: a lone server keeps nothing of a stream in memory. As
/// many copies as the log has; the log itself is never made anew here.
pub(super) async fn restore_heat(jetstream: &Context) -> Result<(), BusError> {
    let log = find(jetstream, subject::LOG_STREAM)
        .await?
        .ok_or(BusError::NoStream(subject::LOG_STREAM))?;
    ensure_one(jetstream, settings::heat_stream(log.config.num_replicas)).await?;
    tracing::info!("the heat stream was gone with its server's memory; it is made anew");
    Ok(())
}

/// Makes the log's stream with the identity of one that is gone. An empty one that stands in its place goes.
pub(super) async fn make_log_anew(jetstream: &Context, identity: &str, replicas: usize) -> Result<(), BusError> {
    if let Some(there) = find(jetstream, subject::LOG_STREAM).await? {
        if there.state.last_sequence > 0 {
            return Err(BusError::Unsafe(vec![format!(
                "stream {} holds {} messages and is not made anew",
                subject::LOG_STREAM,
                there.state.last_sequence
            )]));
        }
        jetstream
            .delete_stream(subject::LOG_STREAM)
            .await
            .map_err(|error| unavailable("removing an empty stream", error))?;
    }
    let made = ensure_one(jetstream, settings::log_stream(replicas, identity.to_owned())).await?;
    if made.config.metadata.get(settings::IDENTITY).map(String::as_str) == Some(identity) {
        Ok(())
    } else {
        Err(unavailable("making the log's stream anew", "another one came first"))
    }
}

fn peers(info: &Info) -> Vec<String> {
    let Some(cluster) = &info.cluster else {
        return Vec::new();
    };
    let replicas = cluster.replicas.iter().map(|peer| peer.name.clone());
    // A lone server names itself as leader; it is the one that is asked anyway.
    let leader = cluster.leader.clone().filter(|_| !cluster.replicas.is_empty());
    replicas.chain(leader).collect()
}

async fn ensure_one(jetstream: &Context, config: Config) -> Result<Info, BusError> {
    let name = config.name.clone();
    if let Some(info) = find(jetstream, &name).await? {
        return Ok(info);
    }
    let created = jetstream.create_stream(config).await;
    // Another scheduler may have created it in the meantime, under its own identity: what counts is what is there.
    match (find(jetstream, &name).await?, created) {
        (Some(info), _) => Ok(info),
        (None, Err(error)) => Err(BusError::Unsafe(vec![format!(
            "stream {name}: the server cannot create it: {error}"
        )])),
        (None, Ok(_)) => Err(unavailable("creating a stream", "it was created and is gone")),
    }
}

async fn find(jetstream: &Context, name: &str) -> Result<Option<Info>, BusError> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(e) if e.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            _ => Err(unavailable("a look at the streams", error)),
        },
    }
}

/// What a stream holds.
pub(super) async fn bounds(jetstream: &Context, name: &'static str) -> Result<Bounds, BusError> {
    let info = find(jetstream, name).await?.ok_or(BusError::NoStream(name))?;
    let identity = info.config.metadata.get(settings::IDENTITY).cloned();
    Ok(Bounds {
        identity: identity.unwrap_or_default(),
        first: Seq(info.state.first_sequence.max(1)),
        last: Seq(info.state.last_sequence),
    })
}

/// The acknowledged position of a durable consumer of the log.
pub(super) async fn acked(jetstream: &Context, durable: &str) -> Result<Option<Seq>, BusError> {
    let stream = jetstream
        .get_stream_no_info(subject::LOG_STREAM)
        .await
        .map_err(|error| unavailable("a look at the acknowledged position", error))?;
    match stream.consumer_info(durable).await {
        Ok(info) => Ok(Some(Seq(info.ack_floor.stream_sequence))),
        Err(error) => {
            use async_nats::jetstream::context::ConsumerInfoErrorKind as Kind;
            match error.kind() {
                Kind::NotFound => Ok(None),
                Kind::StreamNotFound => Err(BusError::NoStream(subject::LOG_STREAM)),
                _ => Err(unavailable("a look at the acknowledged position", error)),
            }
        }
    }
}
