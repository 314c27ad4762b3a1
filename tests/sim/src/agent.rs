//! What a node daemon says beside its images' changes, and how it carries out commands.
//!
//! It says that it joined, reports once a second, and executes the commands that count, one after the other, each once in a
//! life: `Replicate` asks the other node for a store over the bus and begins the join in the image's session. What it has to
//! say in the log it says again, under the same number, until it stands there.

use std::sync::Arc;

use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::command::Outcome;
use hearth_protocol::event::NodeJoined;
use hearth_protocol::limits::TICK_MS;
use hearth_protocol::record::{Extent, Nodes, Record};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, CommandId, Envelope, Epoch, Event as Fact, Incarnation, NodeId, Order, Publisher,
    Seq, TickNo, WallMs, subject,
};
use hearth_replication::session::Input;

use crate::event::Event;
use crate::log::{Published, image_id, image_of};
use crate::world::World;

/// Pause before something that did not reach the log is said again.
const AGAIN_US: u64 = 1_000_000;

/// How long another node is waited for.
const ANSWER_US: u64 = 10_000_000;

impl World {
    /// An envelope with a daemon's next number.
    pub fn envelope(&mut self, node: usize, subject: String) -> Option<Box<Envelope>> {
        let here = &mut self.nodes[node];
        let publisher = Publisher::Node(here.id.clone());
        let daemon = here.daemon.as_mut()?;
        daemon.published += 1;
        Some(Box::new(Envelope {
            codec: CODEC_VERSION,
            subject,
            publisher,
            incarnation: Incarnation(u128::from(daemon.life)),
            publisher_seq: daemon.published,
            time: WallMs(0),
            reason: String::new(),
        }))
    }

    /// A daemon says something until it stands in the log.
    fn tells(&mut self, node: usize, subject: String, fact: Fact) {
        let life = self.nodes[node].starts;
        if let Some(envelope) = self.envelope(node, subject) {
            let us = self.chance.delay(5_000, 500_000, 20);
            let fact = Box::new(fact);
            self.after(
                us,
                Event::Tells {
                    node,
                    life,
                    envelope,
                    fact,
                },
            );
        }
    }

    /// What a daemon says arrives, or does not.
    pub fn told(&mut self, node: usize, life: u64, envelope: Box<Envelope>, fact: Box<Fact>) -> Result<(), String> {
        let again = Event::Tells {
            node,
            life,
            envelope: envelope.clone(),
            fact: fact.clone(),
        };
        if self.nodes[node].log_cut {
            self.after(AGAIN_US, again);
            return Ok(());
        }
        // The answer may be lost, and what comes twice is ignored by whoever reads it.
        let unheard = self.chance.happens(20);
        let joins = matches!(*fact, Fact::NodeJoined(_));
        let ends = match &*fact {
            Fact::CommandFinished { command, .. } => Some(*command),
            _ => None,
        };
        match self.posts(*envelope, *fact, None)? {
            Published::Refused => self.after(AGAIN_US, again),
            Published::Counts(..) | Published::Void(_) if unheard => {
                self.counters.count("said twice in the log");
                self.after(AGAIN_US, again);
            }
            Published::Counts(seq, _) | Published::Void(seq) => {
                let Some(daemon) = &mut self.nodes[node].daemon else {
                    return Ok(());
                };
                if joins {
                    daemon.joined_at = Some(seq);
                }
                if let Some((_, at)) = ends.and_then(|command| daemon.answered.get_mut(&command)) {
                    *at = Some(seq);
                }
            }
        }
        Ok(())
    }

    /// It has read as far as where it joined, and the log lost that before anybody read it.
    pub fn joins_again(&mut self, node: usize) {
        let Some(daemon) = &mut self.nodes[node].daemon else {
            return;
        };
        let read = Seq(daemon.facts.read as u64);
        if daemon.joined_at.take_if(|at| *at <= read).is_none() {
            return;
        }
        if daemon.facts.joined != Some(Incarnation(u128::from(daemon.life))) {
            self.counters.count("node joined the log again");
            self.says_joined(node);
        }
    }

    /// Something arrives at the log.
    pub fn posts(&mut self, envelope: Envelope, fact: Fact, expecting: Option<Seq>) -> Result<Published, String> {
        let takes_void = self.chance.happens(300);
        let what = match &fact {
            Fact::LocationsChanged { image, change } => {
                format!(
                    "image {}, {}: {}",
                    image_of(*image),
                    change.by,
                    crate::text::text(&change.to)
                )
            }
            Fact::CommandGiven(command) => format!("command to {}: {:?}", command.node, command.order),
            Fact::HeatFolded(_) | Fact::Ticked { .. } => String::new(),
            other => other.kind().to_owned(),
        };
        let changed = match &fact {
            Fact::LocationsChanged { image, change } => Some((image_of(*image), change.to.clone())),
            _ => None,
        };
        let (ticked, replicates) = (
            matches!(fact, Fact::Ticked { .. }),
            matches!(fact, Fact::CommandGiven(_)),
        );
        let published = self.log.publish(envelope, fact, expecting, takes_void);
        match &published {
            Published::Counts(seq, before) => {
                if !what.is_empty() {
                    self.note(|| format!("log {seq}: {what}"));
                }
                if ticked {
                    self.ticked_us = self.now_us;
                    self.counters.count("tick");
                }
                if replicates {
                    self.counters.count("repair ordered");
                }
                if let (Some((image, to)), Some(before)) = (changed, before) {
                    if before.epoch() != to.epoch() {
                        self.images[image].reference.granted(to.epoch(), before.clone());
                    } else if to.members().len() < before.members().len() {
                        self.counters.count("set shrunk");
                        self.lost_healed += u64::from(self.healed);
                    }
                    if to.runs().len() > 1 {
                        self.counters.count("map of several runs");
                    }
                }
            }
            Published::Void(_) if changed.is_some() => self.counters.count("void change in the log"),
            Published::Void(_) if replicates => self.counters.count("void command in the log"),
            Published::Void(_) => self.counters.count("other void entry in the log"),
            Published::Refused => return Ok(published),
        }
        let us = self.chance.within(0, 20_000);
        self.after(us, Event::Seen);
        Ok(published)
    }

    /// A daemon that starts says so, and reports from then on.
    pub fn joins(&mut self, node: usize) {
        self.says_joined(node);
        let life = self.nodes[node].starts;
        let us = self.chance.within(1, TICK_MS * 1_000);
        self.after(us, Event::Reports { node, life });
    }

    fn says_joined(&mut self, node: usize) {
        let here = &self.nodes[node];
        let (id, life, store) = (here.id.clone(), here.starts, here.store());
        let joined = NodeJoined {
            node: id.clone(),
            incarnation: Incarnation(u128::from(life)),
            storage_incarnation: store,
            previous: None,
            ram: ByteLen(0),
            main: ByteLen(0),
            fault_domain: format!("rack-{}", node % self.plan.racks),
            peer_address: "unix:/none".to_owned(),
            layers: Vec::new(),
            heat_source: "export".to_owned(),
        };
        self.tells(node, subject::node(&id), Fact::NodeJoined(joined));
    }

    /// A daemon's second is over.
    pub fn reports(&mut self, node: usize, life: u64) {
        self.after(TICK_MS * 1_000, Event::Reports { node, life });
        let here = &mut self.nodes[node];
        let Some(daemon) = &mut here.daemon else { return };
        daemon.reports += 1;
        if !here.log_cut {
            let report = (here.id.clone(), Incarnation(u128::from(life)), daemon.reports);
            self.heard.push(report);
        }
    }

    /// An image is served no more, in order: its node says so, unless the log says that another one owns it.
    pub fn detached(&mut self, node: usize, image: usize, epoch: Epoch) {
        let (id, known) = (image_id(image), self.nodes[node].id.clone());
        let of = |daemon: &crate::node::Daemon| daemon.facts.validity().image(id)?.owner.clone();
        let owner = self.nodes[node].daemon.as_ref().and_then(of);
        if owner.is_some_and(|(owner, _)| owner == known) {
            let subject = subject::image(id, &Publisher::Node(known));
            self.counters.count("image detached");
            self.tells(node, subject, Fact::ImageDetached { image: id, epoch });
        }
    }

    /// Begins with the next command, if one is open.
    pub fn next_command(&mut self, node: usize) -> Result<(), String> {
        let here = &mut self.nodes[node];
        let (id, cut) = (here.id.clone(), here.log_cut);
        let Some(daemon) = &mut here.daemon else { return Ok(()) };
        if cut || daemon.frozen || daemon.executing {
            return Ok(());
        }
        let open: Vec<CommandId> = daemon.facts.open.iter().map(|(_, command)| command.id).collect();
        daemon.answered.retain(|id, _| open.contains(id));
        self.answers_again(node);
        let here = &mut self.nodes[node];
        let Some(daemon) = &mut here.daemon else { return Ok(()) };
        let mut fresh = daemon.facts.open.iter();
        let Some((seq, command)) = fresh.find(|(_, command)| !daemon.answered.contains_key(&command.id)) else {
            return Ok(());
        };
        let (seq, command, tick, life) = (*seq, command.clone(), daemon.facts.tick, daemon.life);
        daemon.executing = true;
        // A command counts if its term was in force at its place in the log.
        let entry = Arc::clone(&self.log.entries[seq.0 as usize - 1]);
        let terms = self.log.entries[..seq.0 as usize - 1]
            .iter()
            .filter(|entry| entry.counts);
        let in_force = terms.rev().find_map(|entry| match entry.event {
            Fact::TermStarted { term, .. } => Some(term),
            _ => None,
        });
        if !entry.counts || in_force != Some(command.term) {
            return Err(format!(
                "{id} executes {:?} of term {}, in force was {in_force:?}",
                command.order, command.term
            ));
        }
        let us = match &command.order {
            Order::Replicate { to, .. } if !self.is_reached(to) => ANSWER_US,
            _ => self.chance.delay(5_000, 1_000_000, 50),
        };
        self.note(|| format!("{id} begins {:?}", command.order));
        let command = Box::new(command);
        self.after(
            us,
            Event::Executes {
                node,
                life,
                command,
                tick,
            },
        );
        Ok(())
    }

    /// Whether a node answers over the bus.
    fn is_reached(&self, id: &NodeId) -> bool {
        let node = &self.nodes[self.number(id)];
        node.running().is_some() && !node.log_cut
    }

    /// Carries a command out, and says how it ended.
    pub fn executes(&mut self, node: usize, command: &Command, tick: TickNo) -> Result<(), String> {
        let why_not = match &command.order {
            _ if tick > command.expires => Some("it expired"),
            Order::Replicate {
                image,
                epoch,
                to,
                blocks,
                ..
            } => self.replicates(node, image_of(*image), *epoch, to, *blocks)?,
            Order::Drop {
                image,
                epoch,
                from,
                keep,
                ..
            } => self.drops(node, image_of(*image), *epoch, from, *keep)?,
            Order::Promote { .. } | Order::Demote { .. } => {
                return Err(format!("an order without heat: {:?}", command.order));
            }
        };
        let outcome = match why_not {
            None => Outcome::Done {
                done: Vec::new(),
                skipped: Vec::new(),
                bytes: ByteLen(0),
                took_us: 0,
            },
            Some(why) => Outcome::Refused { why: why.to_owned() },
        };
        let what = match &command.order {
            Order::Drop { .. } => "drop",
            _ => "repair",
        };
        let answer = match &outcome {
            Outcome::Done { .. } => format!("{what} begun"),
            Outcome::Refused { why } => format!("{what} refused: {why}"),
        };
        self.counters.count(&answer);
        self.note(|| format!("n{node}: {answer}"));
        let Some(daemon) = &mut self.nodes[node].daemon else {
            return Ok(());
        };
        daemon.executing = false;
        daemon.answered.insert(command.id, (outcome.clone(), None));
        self.answers(node, command.id, outcome);
        self.next_command(node)
    }

    fn answers(&mut self, node: usize, command: CommandId, outcome: Outcome) {
        let id = self.nodes[node].id.clone();
        let finished = Fact::CommandFinished {
            command,
            node: id.clone(),
            outcome,
        };
        self.tells(node, subject::node(&id), finished);
    }

    /// It has read as far as where its answers stood, and the log lost them before anybody read them.
    fn answers_again(&mut self, node: usize) {
        let Some(daemon) = &mut self.nodes[node].daemon else {
            return;
        };
        let read = Seq(daemon.facts.read as u64);
        let lost: Vec<_> = daemon
            .answered
            .iter_mut()
            .filter_map(|(command, (outcome, at))| at.take_if(|at| *at <= read).map(|_| (*command, outcome.clone())))
            .collect();
        for (command, outcome) in lost {
            self.counters.count("command answered again");
            self.answers(node, command, outcome);
        }
    }

    /// The record by which a node serves an image as its owner at that epoch; why not, if it does not.
    fn owned_at(&mut self, node: usize, image: usize, epoch: Epoch) -> Result<Option<Arc<Record>>, &'static str> {
        let session = &self.shell(node, image).ok_or("not running")?.session;
        let owner = session.owner().filter(|owner| owner.record().epoch() == epoch);
        match owner {
            None => Err("not the owner at that epoch"),
            Some(owner) if !owner.is_open() => Err("not open"),
            Some(_) => Ok(session.record().cloned()),
        }
    }

    /// Begins to have one more node hold an image; why not, if it does not.
    fn replicates(
        &mut self,
        node: usize,
        image: usize,
        epoch: Epoch,
        to: &NodeId,
        blocks: Option<Extent>,
    ) -> Result<Option<&'static str>, String> {
        let end = BlockIndex(self.plan.blocks - 1);
        let mut extent = blocks.unwrap_or(self.whole());
        extent.last = extent.last.min(end);
        let record = match self.owned_at(node, image, epoch) {
            Ok(record) => record,
            Err(why) => return Ok(Some(why)),
        };
        if record.is_some_and(|record| record.holds(to, extent)) {
            return Ok(Some("held already"));
        }
        let target = self.number(to);
        if !self.is_reached(to) {
            return Ok(Some("the other node does not answer"));
        }
        if self.nodes[target].disks[image].is_none() {
            self.prepare(target, image)?;
        }
        self.begins_join(node, image, target, extent)?;
        if let Some(shell) = self.shell(node, image) {
            shell.ordered = shell.joining.as_ref().is_some_and(|(joining, _)| joining == to);
        }
        Ok(None)
    }

    /// Takes a node's copy away; why not, if it does not.
    fn drops(
        &mut self,
        node: usize,
        image: usize,
        epoch: Epoch,
        from: &NodeId,
        keep: u64,
    ) -> Result<Option<&'static str>, String> {
        let id = self.nodes[node].id.clone();
        let record = match self.owned_at(node, image, epoch) {
            Ok(record) => record,
            Err(why) => return Ok(Some(why)),
        };
        if *from == id {
            return Ok(Some("the owner's own copy"));
        }
        let Some(record) = record.filter(|record| record.everyone().contains(from)) else {
            return Ok(None);
        };
        let left = |members: &Nodes| members.iter().filter(|member| *member != from).count() as u64;
        if record.runs().iter().any(|run| left(&run.members) < keep.max(1)) {
            return Ok(Some("too few would be left"));
        }
        self.step(node, image, Input::Leave(from.clone()), None)?;
        Ok(None)
    }
}
