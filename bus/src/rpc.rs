//! Requests and answers: JSON over request/reply, for administration only.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use hearth_protocol::rpc::{Answer, Failure, FailureKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use crate::error::RequestError;
use crate::{Bus, BusError};

/// Requests of one subject that are answered at the same time; more wait in the connection.
const CONCURRENT_MAX: usize = 32;

/// Longest answer, in bytes; it travels in several messages. A view of 50,000 images is some 30 MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Asks and waits for the answer.
///
/// # Errors
/// The other side's [`Failure`], or one of kind `CannotConnect` (nobody listens), `Timeout` or `Failed` (an answer
/// this build cannot read).
pub async fn request<Req: Serialize, Rep: DeserializeOwned>(
    bus: &Bus,
    subject: impl Into<String>,
    request: &Req,
    timeout: Duration,
) -> Answer<Rep> {
    let subject = subject.into();
    let answer = bus
        .request_bytes(subject.clone(), written(request)?, timeout)
        .await
        .map_err(|error| failure(&error, &subject, timeout))?;
    serde_json::from_slice::<Answer<Rep>>(&answer).map_err(|error| {
        Failure::new(
            FailureKind::Failed,
            format!("cannot read the answer on {subject}: {error}"),
            "use the same version of Hearth on both sides",
        )
    })?
}

/// Asks everyone who listens on `subject` and gathers short answers until `enough` says so of them, or for `wait`.
/// Answers that are failures or cannot be read are left out.
///
/// # Errors
/// One of kind `CannotConnect` without a connection. Nobody listening is none: no answers came.
pub async fn request_all<Req: Serialize, Rep: DeserializeOwned>(
    bus: &Bus,
    subject: impl Into<String>,
    request: &Req,
    wait: Duration,
    enough: impl Fn(&[Rep]) -> bool,
) -> Answer<Vec<Rep>> {
    let subject = subject.into();
    let mut answers = bus
        .request_all_bytes(subject.clone(), written(request)?)
        .await
        .map_err(|error| failure(&error, &subject, wait))?;
    let deadline = tokio::time::Instant::now() + wait;
    let mut all = Vec::new();
    while !enough(&all) {
        let Ok(Some(answer)) = tokio::time::timeout_at(deadline, answers.next()).await else {
            break;
        };
        if let Ok(Ok(answer)) = serde_json::from_slice::<Answer<Rep>>(&answer) {
            all.push(answer);
        }
    }
    Ok(all)
}

fn written(request: &impl Serialize) -> Answer<Bytes> {
    let written = serde_json::to_vec(request).map_err(|error| {
        Failure::new(
            FailureKind::Usage,
            format!("the request cannot be written as JSON: {error}"),
            "",
        )
    })?;
    Ok(written.into())
}

fn failure(error: &RequestError, subject: &str, timeout: Duration) -> Failure {
    match error {
        RequestError::NoResponders => Failure::new(
            FailureKind::CannotConnect,
            format!("nobody answers on {subject}"),
            "check that the daemon runs and is connected to the same NATS: hearth status",
        ),
        RequestError::TimedOut => Failure::new(
            FailureKind::Timeout,
            format!("no answer on {subject} within {} s", timeout.as_secs_f64()),
            "it may still be done: look before you repeat it",
        ),
        RequestError::Connection(reason) => Failure::new(
            FailureKind::CannotConnect,
            format!("no connection to NATS: {reason}"),
            "check that nats-server runs",
        ),
    }
}

/// Answers requests on `subject` until the returned future is dropped or the connection closed. Each request runs in
/// a task of its own, `CONCURRENT_MAX` at a time. Requests that cannot be read are answered with a usage failure.
///
/// # Errors
/// [`BusError::Unavailable`] when the subscription cannot be made.
pub async fn serve<Req, Rep, F, Fut>(bus: &Bus, subject: impl Into<String>, handler: F) -> Result<(), BusError>
where
    Req: DeserializeOwned + Send + 'static,
    Rep: Serialize + Send + 'static,
    F: Fn(Req) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Answer<Rep>> + Send + 'static,
{
    let mut requests = bus.serve_bytes(subject.into()).await?;
    let handler = Arc::new(handler);
    let places = Arc::new(Semaphore::new(CONCURRENT_MAX));
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(incoming) = requests.next().await {
        while tasks.try_join_next().is_some() {}
        let place = Arc::clone(&places)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let handler = Arc::clone(&handler);
        tasks.spawn(async move {
            let answer = match serde_json::from_slice::<Req>(&incoming.payload) {
                Ok(request) => handler(request).await,
                Err(error) => Err(Failure::new(
                    FailureKind::Usage,
                    format!("cannot read the request: {error}"),
                    "use the same version of Hearth on both sides",
                )),
            };
            incoming.respond(encode(&answer).into()).await;
            drop(place);
        });
    }
    Ok(())
}

fn encode<Rep: Serialize>(answer: &Answer<Rep>) -> Vec<u8> {
    let failure = |message: String| {
        let failure: Answer<()> = Err(Failure::new(
            FailureKind::Failed,
            message,
            "ask for less at once, or report this as a bug of Hearth",
        ));
        serde_json::to_vec(&failure).expect("a failure always encodes")
    };
    match serde_json::to_vec(answer) {
        Ok(bytes) if bytes.len() <= ANSWER_BYTES_MAX => bytes,
        Ok(bytes) => failure(format!(
            "the answer is {} bytes long, the limit is {ANSWER_BYTES_MAX}",
            bytes.len()
        )),
        Err(error) => failure(format!("the answer cannot be written as JSON: {error}")),
    }
}
