//! What the servers say about themselves: over the connection where the account may ask, else over their monitoring
//! port.

use std::time::Duration;

use async_nats::Client;
use futures::StreamExt;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::settings::ServerFacts;

/// Every server of a cluster answers within this; the answers of all are waited for.
const ANSWERS_WITHIN: Duration = Duration::from_millis(700);

/// Longest answer of a monitoring port that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

#[derive(Deserialize)]
struct Pinged {
    data: Varz,
}

#[derive(Deserialize)]
struct Varz {
    server_name: String,
    version: String,
    #[serde(default)]
    jetstream: JetStream,
}

#[derive(Deserialize, Default)]
struct JetStream {
    config: Option<JetStreamConfig>,
}

#[derive(Deserialize)]
struct JetStreamConfig {
    #[serde(default)]
    sync_always: bool,
}

impl From<Varz> for ServerFacts {
    fn from(varz: Varz) -> Self {
        Self {
            name: varz.server_name,
            version: varz.version,
            jetstream: varz.jetstream.config.is_some(),
            sync_always: varz.jetstream.config.is_some_and(|c| c.sync_always),
        }
    }
}

/// Asks every server that can be asked. What cannot be read is logged and missing in the answer.
pub(super) async fn read(client: &Client, monitors: &[String]) -> Vec<ServerFacts> {
    let mut facts = ping(client).await;
    for monitor in monitors {
        match get(monitor).await {
            Ok(server) => facts.push(server),
            Err(reason) => tracing::warn!(monitor, %reason, "cannot read a server's settings from its monitoring port"),
        }
    }
    facts
}

async fn ping(client: &Client) -> Vec<ServerFacts> {
    let inbox = client.new_inbox();
    let mut facts = Vec::new();
    let Ok(mut answers) = client.subscribe(inbox.clone()).await else {
        return facts;
    };
    if client
        .publish_with_reply("$SYS.REQ.SERVER.PING.VARZ", inbox, "".into())
        .await
        .is_err()
    {
        return facts;
    }
    let gather = async {
        while let Some(answer) = answers.next().await {
            if answer.status.is_some() {
                break; // nobody there who answers: the account may not ask
            }
            match serde_json::from_slice::<Pinged>(&answer.payload) {
                Ok(pinged) => facts.push(pinged.data.into()),
                Err(error) => tracing::warn!(%error, "a server's answer to VARZ cannot be read"),
            }
        }
    };
    // The end of the time is the normal end: nobody knows how many servers will answer.
    let _ = tokio::time::timeout(ANSWERS_WITHIN, gather).await;
    facts
}

async fn get(monitor: &str) -> Result<ServerFacts, String> {
    let host = monitor
        .strip_prefix("http://")
        .ok_or("the address must start with http://")?
        .trim_end_matches('/');
    let exchange = async {
        let mut socket = TcpStream::connect(host).await?;
        socket
            .write_all(format!("GET /varz HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes())
            .await?;
        let mut answer = Vec::new();
        socket.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(3), exchange)
        .await
        .map_err(|_| "no answer within 3 s".to_owned())?
        .map_err(|error| error.to_string())?;
    let split = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let body = &answer[split.ok_or("not an HTTP answer")? + 4..];
    let varz: Varz = serde_json::from_slice(body).map_err(|error| format!("not the answer of nats-server: {error}"))?;
    Ok(varz.into())
}
