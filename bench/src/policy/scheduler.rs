//! The scheduler's side of a run: its fold and its decisions, numbered as a leader and a node would.

use std::collections::BTreeMap;

use anyhow::Result;
use hearth_protocol::event::HeatFolded;
use hearth_protocol::{Command, Envelope, Event, Incarnation, NodeId, Publisher, Seq, Term, TickNo, WallMs};
use scheduler_core::State;

/// What the scheduler hears.
#[derive(Clone)]
pub enum Input {
    /// A window of heat; the tick that follows it comes at this time.
    Second(Box<HeatFolded>, WallMs),
    /// An event of the node.
    Node(Box<Event>),
}

/// See the module.
pub struct Scheduler {
    state: State,
    node: NodeId,
    seq: u64,
    numbers: BTreeMap<Publisher, u64>,
    tick: u64,
    time: WallMs,
}

impl Scheduler {
    /// The leader of an empty log, and of this node.
    ///
    /// # Errors
    /// None that can happen: a constant name is parsed.
    pub fn new(node: NodeId) -> Result<Self> {
        let mut scheduler = Self {
            state: State::default(),
            node,
            seq: 0,
            numbers: BTreeMap::new(),
            tick: 0,
            time: WallMs(1_000),
        };
        scheduler.lead(&Event::TermStarted {
            term: Term(1),
            previous: None,
        })?;
        Ok(scheduler)
    }

    fn apply(&mut self, publisher: Publisher, event: &Event) {
        let number = self.numbers.entry(publisher.clone()).or_default();
        *number += 1;
        let envelope = Envelope {
            codec: 1,
            subject: "hearth.log.bench".into(),
            reason: Default::default(),
            publisher,
            incarnation: Incarnation(1),
            publisher_seq: *number,
            time: self.time,
        };
        self.seq += 1;
        let applied = self.state.apply(Seq(self.seq), &envelope, event);
        assert_eq!(applied.judged, scheduler_core::Judged::Valid, "{}", event.kind());
    }

    fn lead(&mut self, event: &Event) -> Result<()> {
        self.apply(Publisher::Scheduler("bench".parse()?), event);
        Ok(())
    }

    /// Folds what was heard; the decisions, if it ended with a tick.
    ///
    /// # Errors
    /// None that can happen: a constant name is parsed.
    pub fn hear(&mut self, input: Input) -> Result<Vec<Command>> {
        let (heat, time) = match input {
            Input::Second(heat, time) => (heat, time),
            Input::Node(event) => {
                self.apply(Publisher::Node(self.node.clone()), &event);
                return Ok(Vec::new());
            }
        };
        self.lead(&Event::HeatFolded(*heat))?;
        self.tick += 1;
        self.time = time;
        self.lead(&Event::Ticked {
            term: Term(1),
            tick: TickNo(self.tick),
            time,
        })?;
        let commands = self.state.decide();
        for command in &commands {
            self.lead(&Event::CommandGiven(command.clone()))?;
        }
        Ok(commands)
    }
}
