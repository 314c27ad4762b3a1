//! A message as it came from a stream, and the check that its envelope says what its subject says.

use bytes::Bytes;
use hearth_protocol::{DecodeError, Envelope, Event, Message, Publisher, Seq};

/// A message of a stream, undecoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its place in the stream.
    pub seq: Seq,
    /// The subject it was published on, as the server knows it.
    pub subject: String,
    /// The id under which the server drops repeats, if it has one.
    pub message_id: Option<String>,
    /// Its bytes.
    pub frame: Bytes,
}

/// A message of the log, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The two parts as they are stored.
    pub message: Message,
    /// Who published it, when.
    pub envelope: Envelope,
    /// What it says.
    pub event: Event,
}

/// Why a message in the log's stream is none of Hearth's. It stays in the log and counts for nothing.
#[derive(Debug, thiserror::Error)]
pub enum Foreign {
    /// Damaged, or not written by Hearth.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The envelope names another subject than the one the server took it on.
    #[error("the envelope says subject {claimed:?}, but it was published on {actual:?}")]
    Subject {
        /// In the envelope.
        claimed: String,
        /// As the server knows it.
        actual: String,
    },
    /// The publisher has no right to that subject.
    #[error("{publisher} must not publish on {subject}")]
    Publisher {
        /// In the envelope.
        publisher: Publisher,
        /// The subject.
        subject: String,
    },
}

impl Fetched {
    /// Decodes a message of the log. The server's subject is the one thing a publisher cannot forge (its permissions
    /// are by subject), so the envelope must agree with it.
    ///
    /// # Errors
    /// [`Foreign`]; such messages are kept and not applied.
    pub fn decode(&self) -> Result<Decoded, Foreign> {
        let message = Message::from_frame(&self.frame)?;
        let envelope = message.envelope()?;
        if envelope.subject != self.subject {
            return Err(Foreign::Subject {
                claimed: envelope.subject,
                actual: self.subject.clone(),
            });
        }
        if !may_publish(&envelope.publisher, &self.subject) {
            return Err(Foreign::Publisher {
                publisher: envelope.publisher,
                subject: self.subject.clone(),
            });
        }
        let event = message.event()?;
        Ok(Decoded {
            message,
            envelope,
            event,
        })
    }
}

/// Whether `subject` belongs to `publisher`, by its tokens.
fn may_publish(publisher: &Publisher, subject: &str) -> bool {
    let tokens: Vec<&str> = subject.split('.').collect();
    match (tokens.as_slice(), publisher) {
        (["hearth", "log", "image" | "layer", _, token], _) => *token == publisher.token(),
        (["hearth", "log", "node", id], Publisher::Node(node)) => *id == node.as_str(),
        (["hearth", "log", "scheduler", id, "lead" | "heat" | "record"], Publisher::Scheduler(scheduler)) => {
            *id == scheduler.as_str()
        }
        (["hearth", "log", "command", _], Publisher::Scheduler(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::{ImageId, subject};

    use super::*;

    #[test]
    fn a_publisher_has_only_its_own_subjects() {
        let node = Publisher::Node("n1".parse().unwrap());
        let other = Publisher::Node("n2".parse().unwrap());
        let sched = Publisher::Scheduler("s1".parse().unwrap());
        let n1 = "n1".parse().unwrap();
        let s1 = "s1".parse().unwrap();
        let check = |who: &Publisher, subject: &str, allowed: bool| {
            assert_eq!(may_publish(who, subject), allowed, "{who} on {subject}");
        };
        check(&node, &subject::image(ImageId(7), &node), true);
        check(&other, &subject::image(ImageId(7), &node), false);
        check(&node, &subject::node(&n1), true);
        check(&other, &subject::node(&n1), false);
        check(&sched, &subject::node(&n1), false);
        check(&sched, &subject::command(&n1), true);
        check(&node, &subject::command(&n1), false);
        check(&sched, &subject::lead(&s1), true);
        check(&sched, &subject::folded_heat(&s1), true);
        check(&sched, &subject::record(&s1), true);
        check(&sched, &subject::lead(&"s2".parse().unwrap()), false);
        check(&sched, "hearth.log.else.s1", false);
    }
}
