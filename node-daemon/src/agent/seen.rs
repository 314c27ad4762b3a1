//! What this node has seen of the log, remembered over restarts: JetStream orders the events, but is not the only
//! witness of them. A stream that does not hold what was seen was rolled back or replaced.

use std::io;
use std::path::PathBuf;

use hearth_bus::{Bus, BusError, Fetched};
use hearth_protocol::chain::{self, Hash, Witness};
use hearth_protocol::{Event, Seq};

use crate::mutants;
use crate::store::fault::Faults;
use crate::store::os::replace_note;

/// Name of the file in the store's directory; `hearth log verify --witness` reads it.
pub const FILE: &str = "log-witness.json";

/// Acceptances of a loss remembered; each is an operator's act.
const ACCEPTED_MAX: usize = 64;

/// The newest message seen, and a witness on disk.
#[derive(Debug, Clone)]
pub struct Seen {
    file: PathBuf,
    /// Position and frame hash of the newest message.
    newest: Option<(Seq, Hash)>,
    /// Frame hashes of the acceptances of a loss that were seen, oldest first.
    accepted: Vec<Hash>,
}

impl Seen {
    /// What an earlier process has seen.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged: says what to do.
    pub fn open(file: PathBuf) -> io::Result<Self> {
        let (mut newest, mut accepted) = (None, Vec::new());
        match std::fs::read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(bytes) => {
                let damaged = || {
                    io::Error::other(format!(
                        "{} is damaged: it says what this node saw of the log; remove it if the stream is known to be \
                         whole",
                        file.display()
                    ))
                };
                let witness = serde_json::from_slice::<Witness>(&bytes).map_err(|_| damaged())?;
                let hash = |text: &String| chain::from_hex(text).ok_or_else(damaged);
                accepted = witness.accepted.iter().map(hash).collect::<Result<_, _>>()?;
                let (seq, frame) = witness.message.ok_or_else(damaged)?;
                newest = Some((seq, hash(&frame)?));
            }
        }
        Ok(Self { file, newest, accepted })
    }

    /// One that has seen nothing yet but knows which losses were accepted before.
    pub fn anew(&self) -> Self {
        Self {
            newest: None,
            ..self.clone()
        }
    }

    /// Takes a message; one that records the log's chain value is witnessed on disk.
    ///
    /// # Errors
    /// The file system's; the message is remembered all the same while this process lives.
    pub fn take(&mut self, fetched: &Fetched, event: Option<&Event>) -> io::Result<()> {
        self.note(fetched, event);
        let (
            Some((seq, frame)),
            Some(Event::DigestRecorded {
                at, chain: Some(value), ..
            }),
        ) = (self.newest, event)
        else {
            return Ok(());
        };
        let witness = Witness {
            seq: *at,
            chain: chain::hex(value),
            message: Some((seq, chain::hex(&frame))),
            accepted: self.accepted.iter().map(chain::hex).collect(),
        };
        replace_note(&self.file, &serde_json::to_vec_pretty(&witness)?, &Faults::default())
    }

    /// Takes a message, and leaves the disk alone.
    pub fn note(&mut self, fetched: &Fetched, event: Option<&Event>) {
        let frame = chain::part(&fetched.frame);
        self.newest = Some((fetched.seq, frame));
        if let Some(Event::LossAccepted { .. }) = event
            && !self.accepted.contains(&frame)
        {
            if self.accepted.len() == ACCEPTED_MAX {
                self.accepted.remove(0);
            }
            self.accepted.push(frame);
        }
    }

    /// Whether a valid event accepts that what was seen counts no more: an operator wrote it after this was seen, and it
    /// speaks of a position up to which this goes.
    pub fn is_released_by(&self, fetched: &Fetched, event: &Event) -> bool {
        let (Event::LossAccepted { positions, .. }, Some((newest, _))) = (event, &self.newest) else {
            return false;
        };
        positions.0 <= *newest && !self.accepted.contains(&chain::part(&fetched.frame))
    }

    /// Whether the stream still holds the newest message seen; the inner error says what it holds instead.
    ///
    /// # Errors
    /// Transient ones, which say nothing.
    pub async fn is_in(&self, bus: &Bus) -> Result<Result<(), String>, BusError> {
        let Some((seq, frame)) = self.newest.as_ref().filter(|_| !mutants::ROLLBACK_UNSEEN.is_on()) else {
            return Ok(Ok(()));
        };
        match bus.get(*seq).await? {
            Some(there) if chain::part(&there.frame) == *frame => Ok(Ok(())),
            Some(_) => Ok(Err(format!(
                "the stream HEARTH holds another message at {seq} than this node has read there: it was rolled back and \
                 went on, or was replaced"
            ))),
            None => {
                let last = bus.bounds().await?.last;
                Ok(Err(BusError::RolledBack { seen: *seq, last }.to_string()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hearth_bus::MemoryCluster;
    use hearth_bus::settings::Wanted;
    use hearth_bus::{LogPublisher, new_incarnation};
    use hearth_protocol::{Publisher, Term, subject};

    use super::*;

    async fn events(bus: &Bus, count: u64) {
        let id = "s1".parse().unwrap();
        let publisher = LogPublisher::new(
            bus.clone(),
            Publisher::Scheduler("s1".parse().unwrap()),
            new_incarnation(),
        );
        for n in 0..count {
            let event = Event::DigestRecorded {
                term: Term(1),
                at: Seq(n),
                state: [1; 32],
                decisions: [2; 32],
                chain: Some([3; 32]),
            };
            publisher.publish(subject::record(&id), &event).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_stream_that_lost_or_changed_what_was_seen_is_known_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let cluster = MemoryCluster::default();
        let bus = Bus::memory(&cluster);
        let wanted = Wanted {
            replicas: 1,
            dev: true,
            monitors: Vec::new(),
        };
        bus.ensure_streams(&wanted).await.unwrap();
        events(&bus, 5).await;
        let mut seen = Seen::open(file.clone()).unwrap();
        assert_eq!(seen.is_in(&bus).await.unwrap(), Ok(()), "nothing was seen yet");
        let fetched = bus
            .log_reader(Seq(1), Vec::new())
            .fetch(9, std::time::Duration::ZERO)
            .await
            .unwrap();
        for message in &fetched {
            seen.take(message, message.decode().ok().map(|d| d.event).as_ref())
                .unwrap();
        }
        let witness: Witness = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!((witness.seq, witness.chain), (Seq(4), chain::hex(&[3; 32])));
        drop(seen);
        let seen = Seen::open(file.clone()).unwrap();
        assert_eq!(seen.is_in(&bus).await.unwrap(), Ok(()));
        cluster.roll_back(3);
        let why = seen.is_in(&bus).await.unwrap().unwrap_err();
        assert!(why.contains("ends at 3, but 5"), "{why}");
        events(&bus, 4).await;
        let why = seen.is_in(&bus).await.unwrap().unwrap_err();
        assert!(why.contains("another message at 5"), "{why}");
        std::fs::write(&file, "{").unwrap();
        assert!(Seen::open(file).unwrap_err().to_string().contains("is damaged"));
    }

    #[test]
    fn an_acceptance_releases_once_and_only_what_it_speaks_of() {
        let file = PathBuf::from("nowhere");
        let message = |seq: u64, frame: &str| Fetched {
            seq: Seq(seq),
            subject: "s".into(),
            message_id: None,
            frame: frame.to_owned().into(),
        };
        let accepts = |first: u64| Event::LossAccepted {
            term: Term(1),
            positions: (Seq(first), Seq(90)),
            chain: [3; 32],
            reason: String::new(),
        };
        let mut seen = Seen {
            file,
            newest: None,
            accepted: Vec::new(),
        };
        seen.note(&message(50, "old"), None);
        assert!(seen.is_released_by(&message(41, "a"), &accepts(40)));
        assert!(seen.is_released_by(&message(41, "a"), &accepts(50)));
        assert!(
            !seen.is_released_by(&message(60, "a"), &accepts(51)),
            "it speaks of later ones"
        );
        // Read on, rolled back once more: the old word does not cover the new loss, a new one does.
        let mut seen = seen.anew();
        seen.note(&message(41, "a"), Some(&accepts(40)));
        seen.note(&message(70, "new"), None);
        assert!(!seen.is_released_by(&message(41, "a"), &accepts(40)));
        assert!(seen.is_released_by(&message(60, "b"), &accepts(60)));
    }
}
