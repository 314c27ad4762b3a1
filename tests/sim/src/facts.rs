//! What one reader of the log knows: a fold of its prefix with the protocol's one rule of which events count.
//!
//! Nodes keep one each, as the node daemon does, and the log keeps one of all of itself. That two folds of one prefix agree
//! is checked wherever a node acts on one.

use hearth_protocol::publishers::{Arrival, Publishers};
use hearth_protocol::validity::Validity;
use hearth_protocol::{Command, Envelope, Event, Incarnation, NodeId, Seq, TickNo};

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// How many entries it has folded.
    pub read: usize,
    /// The last tick that counts.
    pub tick: TickNo,
    /// The last entry on the leadership subjects, whether it counts or not: compare-and-publish looks at the subject.
    pub last_lead: Seq,
    /// Commands to `own` that count and are not answered, in the order given, with their places in the log.
    pub open: Vec<(Seq, Command)>,
    /// The life that `own` last joined with.
    pub joined: Option<Incarnation>,
    validity: Validity,
    publishers: Publishers,
    own: Option<NodeId>,
}

impl Facts {
    /// Of a node, whose commands it keeps.
    pub fn of(own: NodeId) -> Self {
        Self {
            own: Some(own),
            ..Self::default()
        }
    }

    /// The rule's memory.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }

    /// Folds the next entry; says whether it counts.
    pub fn apply(&mut self, envelope: &Envelope, event: &Event) -> bool {
        self.read += 1;
        let seq = Seq(self.read as u64);
        if let Event::TermStarted { .. } | Event::Ticked { .. } = event {
            self.last_lead = seq;
        }
        let repeats = self.publishers.arrive(envelope) == Arrival::Repeat;
        if repeats || !self.validity.judge(&envelope.publisher, event).is_valid() {
            return false;
        }
        match event {
            Event::Ticked { tick, .. } => self.tick = *tick,
            Event::NodeJoined(joined) if Some(&joined.node) == self.own.as_ref() => {
                self.joined = Some(joined.incarnation);
            }
            Event::CommandGiven(command)
                if Some(&command.node) == self.own.as_ref()
                    && self.open.iter().all(|(_, known)| known.id != command.id) =>
            {
                self.open.push((seq, command.clone()));
            }
            Event::CommandFinished { command, node, .. } if Some(node) == self.own.as_ref() => {
                self.open.retain(|(_, known)| known.id != *command);
            }
            _ => {}
        }
        true
    }
}
