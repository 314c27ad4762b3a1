//! The monitor of a QEMU (QMP): one JSON value a line, over a unix socket.
//!
//! Knows no command by itself. Invariant: answers come in the order of the commands; events in between are kept, in order,
//! for whoever asks for them.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hearth_protocol::rpc::{Failure, FailureKind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::Outcome;

/// Longest line that is taken: QEMU's own limit for what it is sent is 64 MiB, what it says of a migration is a few KiB.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How long a QEMU may take to greet or to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Events kept for whoever asks; older ones go.
const EVENTS_MAX: usize = 256;

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    /// For messages.
    socket: PathBuf,
    lines: BufReader<OwnedReadHalf>,
    /// A line of which not all has come.
    part: Vec<u8>,
    write: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves the negotiation behind.
    ///
    /// # Errors
    /// `CannotConnect` if nobody listens, or somebody else talks to it; `Failed` if it is no monitor.
    pub async fn connect(socket: &Path) -> Outcome<Self> {
        let cannot = |why: String| {
            Failure::new(
                FailureKind::CannotConnect,
                format!("QEMU's monitor {} does not answer: {why}", socket.display()),
                "start QEMU with -qmp unix:PATH,server=on,wait=off; a monitor talks to one client at a time",
            )
        };
        let stream = UnixStream::connect(socket).await.map_err(|e| cannot(e.to_string()))?;
        let (read, write) = stream.into_split();
        let mut qmp = Self {
            socket: socket.to_owned(),
            lines: BufReader::new(read),
            part: Vec::new(),
            write,
            events: VecDeque::new(),
        };
        let greeting = match tokio::time::timeout(ANSWER, qmp.line()).await {
            Ok(line) => line?,
            Err(_) => return Err(cannot(format!("no greeting within {} s", ANSWER.as_secs()))),
        };
        if greeting.get("QMP").is_none() {
            return Err(qmp.failed(&format!("it greets with {greeting}, and so is no QMP monitor")));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    fn failed(&self, what: &str) -> Failure {
        Failure::new(
            FailureKind::Failed,
            format!("QEMU's monitor {}: {what}", self.socket.display()),
            "",
        )
    }

    /// The next value. Cancelling loses nothing.
    async fn line(&mut self) -> Outcome<Value> {
        loop {
            let left = LINE_BYTES_MAX.saturating_sub(self.part.len() as u64);
            let read = (&mut self.lines).take(left).read_until(b'\n', &mut self.part).await;
            let end = match read {
                Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                other => other,
            };
            if let Err(error) = end {
                return Err(self.failed(&match error.kind() {
                    io::ErrorKind::UnexpectedEof if left == 0 => "a line is longer than any that QEMU sends".into(),
                    io::ErrorKind::UnexpectedEof => "it closed the connection; has QEMU ended?".into(),
                    _ => format!("reading: {error}"),
                }));
            }
            if self.part.last() != Some(&b'\n') {
                continue;
            }
            let line = std::mem::take(&mut self.part);
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line).map_err(|error| self.failed(&format!("no JSON ({error})")));
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Carries out a command and returns what it returns.
    ///
    /// # Errors
    /// What QEMU says against it; a broken connection; no answer in time.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        let sent = self.write.write_all(text.as_bytes()).await;
        sent.map_err(|error| self.failed(&format!("{command}: {error}")))?;
        let deadline = tokio::time::Instant::now() + ANSWER;
        loop {
            let mut answer = match tokio::time::timeout_at(deadline, self.line()).await {
                Ok(line) => line?,
                Err(_) => {
                    return Err(Failure::new(
                        FailureKind::Timeout,
                        format!(
                            "QEMU's monitor {} did not answer {command} within {} s",
                            self.socket.display(),
                            ANSWER.as_secs()
                        ),
                        "look at that QEMU; a disk that does not answer stops its monitor, too",
                    ));
                }
            };
            if answer.get("event").is_some() {
                self.keep(answer);
            } else if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            } else {
                let why = answer["error"]["desc"].as_str().unwrap_or("it says nothing more");
                return Err(self.failed(&format!("{command}: {why}")));
            }
        }
    }

    /// The next event: its name and data. Cancelling loses nothing.
    ///
    /// # Errors
    /// A broken connection.
    pub async fn event(&mut self) -> Outcome<(String, Value)> {
        loop {
            let mut event = match self.events.pop_front() {
                Some(event) => event,
                None => self.line().await?,
            };
            if let Some(name) = event["event"].as_str().map(str::to_owned) {
                return Ok((name, event["data"].take()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// A monitor that says these lines, whatever it is asked.
    async fn monitor(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for line in lines {
                stream.write_all(line.as_bytes()).await.unwrap();
            }
            let mut asked = Vec::new();
            let _ = stream.read_to_end(&mut asked).await;
        });
        (dir, path)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\r\n{\"return\": {}}\r\n";

    #[tokio::test]
    async fn events_between_answers_are_kept_in_order() {
        let lines = &[
            GREETING,
            "{\"event\": \"A\", \"data\": {\"n\": 1}}\r\n",
            "{\"event\": \"B\"}\r\n{\"return\": {\"status\": \"running\"}}\r\n{\"event\": ",
            "\"C\"}\r\n",
        ];
        let (_dir, path) = monitor(lines).await;
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let status = qmp.execute("query-status", json!({})).await.unwrap();
        assert_eq!(status["status"], "running");
        assert_eq!(qmp.event().await.unwrap(), ("A".into(), json!({"n": 1})));
        assert_eq!(qmp.event().await.unwrap().0, "B");
        assert_eq!(qmp.event().await.unwrap().0, "C");
    }

    #[tokio::test]
    async fn what_qemu_says_against_a_command_is_the_error() {
        let lines = &[
            GREETING,
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
        ];
        let (_dir, path) = monitor(lines).await;
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let error = qmp.execute("migrate", json!({})).await.unwrap_err();
        assert!(error.message.contains("migrate: no such thing"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_monitor_is_told() {
        for (said, why) in [("220 mail\n", "no JSON"), ("{\"return\": {}}\n", "no QMP monitor")] {
            let lines: &'static [&'static str] = match said {
                "220 mail\n" => &["220 mail\n"],
                _ => &["{\"return\": {}}\n"],
            };
            let (_dir, path) = monitor(lines).await;
            let error = Qmp::connect(&path).await.unwrap_err();
            assert!(error.message.contains(why), "{error}");
        }
        let error = Qmp::connect(Path::new("/nowhere/qmp")).await.unwrap_err();
        assert_eq!(error.kind, FailureKind::CannotConnect);
        let (_dir, path) = monitor(&[GREETING]).await;
        let mut qmp = Qmp::connect(&path).await.unwrap();
        drop(_dir);
        // Nothing more comes; a QEMU that ended says so instead.
        let nothing = tokio::time::timeout(Duration::from_millis(50), qmp.event()).await;
        assert!(nothing.is_err());
    }
}
