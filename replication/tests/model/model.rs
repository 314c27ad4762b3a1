//! What may happen next, and what must hold.

use hearth_protocol::{BlockIndex, Incarnation, NodeId};
use hearth_replication::handover::Incoming;
use hearth_replication::member;
use hearth_replication::mutants::Rules;
use hearth_replication::owner;
use hearth_replication::request::{Extent, Nodes, Request, RequestId, Work};
use hearth_replication::takeover;
use stateright::{Model, Property};

use super::actions::Action;
use super::config::{Config, Time};
use super::ghost::{Asked, BLOCKS, DURABLE, LINEARIZABLE, ON_EVERY_MEMBER, ONE_ANSWER, ONE_WRITER, OUTSIDE};
use super::world::{Message, WHOLE, World, name, number};

pub const ONE_SIDE: &str = "at most one node can write";
pub const A_COPY: &str = "every member of the newest set has its copy";

/// One exploration.
#[derive(Debug, Clone, Copy)]
pub struct Exploration(pub Config);

impl Exploration {
    fn clients(&self, world: &World, actions: &mut Vec<Action>) {
        let left = &world.left;
        for (at, node) in world.nodes.iter().enumerate() {
            if left.seals > 0
                && let Some(to) = config_destination(&self.0, at)
                && world.nodes[to].incoming.is_some()
                && self.0.rules != Rules::default()
            {
                actions.push(Action::IncomingWrite(to));
            }
            let Some(owner) = &node.owner else { continue };
            self.renewal(world, at, owner, actions);
            if owner.is_open() {
                if left.writes[at] > 0 {
                    let both = self.0.straddling && world.ops > 0;
                    actions.push(Action::Write(at, [true, both]));
                }
                if left.flushes[at] > 0 {
                    actions.push(Action::Flush(at));
                }
                if left.reads[at] > 0 {
                    actions.extend((0..self.0.blocks).map(|block| Action::Read(at, block)));
                }
                if left.seals > 0 && self.0.destination.is_some_and(|to| to != at) {
                    actions.push(Action::Seal(at));
                }
                let busy = owner.is_changing();
                if left.joins > 0 && !busy && !owner.record().members().contains(&name(self.0.joiner)) {
                    actions.push(Action::Join(at));
                }
                if left.leaves > 0 && !busy && owner.record().members().len() > 1 {
                    actions.push(Action::Leave(at));
                }
            }
            if left.failures > 0 {
                for member in owner.record().everyone() {
                    if number(&member) != at {
                        actions.push(Action::Fail(at, number(&member)));
                    }
                }
            }
        }
    }

    fn renewal(&self, world: &World, at: usize, owner: &owner::Owner, actions: &mut Vec<Action>) {
        let expired = owner.answers_until().is_some_and(|until| until <= world.now(at));
        let wanted = match self.0.time {
            Time::Jumps => expired,
            Time::Ticks => world.left.renewals > 0,
        };
        if wanted {
            actions.push(Action::Renew(at));
        }
    }

    fn faults(&self, world: &World, actions: &mut Vec<Action>) {
        let left = &world.left;
        for (at, node) in world.nodes.iter().enumerate() {
            let under_way = !node.jobs.is_empty() || node.persisting.is_some();
            let ends = if under_way { &[true, false][..] } else { &[false] };
            for end in ends {
                if left.kills > 0 {
                    actions.push(Action::Kill(at, *end));
                }
                if left.power_losses > 0 && !*end {
                    actions.extend((0..world.outcomes(at)).map(|choice| Action::PowerLoss(at, *end, choice)));
                }
            }
        }
        if left.site_losses > 0 {
            let [a, b, c] = [0, 1, 2].map(|at| world.outcomes(at));
            for choice in 0..a * b * c {
                actions.push(Action::SiteLoss([choice % a, choice / a % b, choice / a / b]));
            }
        }
        if left.tail_losses > 0 && !world.log.is_empty() {
            actions.push(Action::TailLoss);
        }
    }

    fn takeovers(&self, world: &World, actions: &mut Vec<Action>) {
        for (at, node) in world.nodes.iter().enumerate() {
            if node.frozen {
                continue;
            }
            let others: Vec<usize> = (0..3).filter(|other| *other != at).collect();
            let subsets = (0..1_u8 << others.len()).map(|bits| {
                let heard = others.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0);
                heard.fold(1 << at, |all, (_, other)| all | 1 << other)
            });
            let asking = node.takeover.as_ref().is_some_and(takeover::Takeover::is_asking);
            let decided = |incoming: &Incoming| incoming.is_decided(&node.aggregate);
            if node.incoming.as_ref().is_some_and(decided) && world.left.takeovers[at] > 0 {
                actions.extend(subsets.clone().map(|heard| Action::Again(at, heard)));
            }
            if asking {
                actions.extend(subsets.map(|heard| Action::Hear(at, heard)));
            } else if world.left.takeovers[at] > 0 && node.owner.is_none() && node.incoming.is_none() {
                actions.extend(
                    subsets
                        .filter(|heard| {
                            let heard = (0..3).filter(|at| heard & (1 << at) != 0).map(name).collect();
                            self.0.unheard_loss || heard_of_the_loss(world, &heard)
                        })
                        .map(|heard| Action::Takeover(at, heard)),
                );
            }
        }
    }
}

/// Whether one of these nodes has recorded what the log lost. True while nothing that was recorded is lost.
fn heard_of_the_loss(world: &World, heard: &Nodes) -> bool {
    let witnesses = world.witnesses();
    witnesses.is_empty() || !witnesses.is_disjoint(heard)
}

fn config_destination(config: &Config, at: usize) -> Option<usize> {
    config.destination.filter(|to| *to != at && at == 0)
}

/// Drops messages that can never again change anything: answers to sessions that are over, requests that will be refused
/// by whoever gets them and whose refusal nobody waits for, and changes that can only be void.
fn tidy(config: &Config, world: &mut World) {
    let sound = config.rules == Rules::default();
    let World {
        nodes,
        messages,
        aggregate,
        left,
        ..
    } = world;
    messages.retain(|message| match &**message {
        Message::Answer { to, stamp, .. } => {
            let node = &nodes[*to];
            let grant = (stamp.epoch, stamp.lease);
            let session = node.owner.as_ref().is_some_and(|owner| owner.record().grant() == grant);
            session || node.takeover.is_some()
        }
        Message::Raised { to, .. } | Message::NotRaised { to, .. } => {
            nodes[*to].owner.is_some() || nodes[*to].takeover.is_some()
        }
        Message::Request { from, to, request, .. } => {
            let grant = (request.stamp.epoch, request.stamp.lease);
            let sender = &nodes[*from];
            let session = sender
                .owner
                .as_ref()
                .is_some_and(|owner| owner.record().grant() == grant);
            let Some(record) = nodes[*to].disk.durable.record.as_ref() else {
                return true;
            };
            let ended = record.epoch() > request.stamp.epoch && !session && sender.takeover.is_none();
            let renewal = matches!(request.work, Work::Renew { .. });
            let disk = &nodes[*to].disk;
            let same_disk = !disk.failed && request.store == Incarnation(u128::from(disk.life));
            let older_set =
                same_disk && record.grant() == grant && record.stamp().set_version > request.stamp.set_version;
            !(sound && (ended || (older_set && !renewal)))
        }
        Message::Publish(change) => {
            let over = aggregate.record.stamp().set_version > change.from.set_version;
            left.tail_losses > 0 || !over
        }
        Message::Raise { .. } | Message::Sealed { .. } | Message::Drop { .. } => true,
    });
}

impl Model for Exploration {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.0)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for message in &world.messages {
            if let Message::Publish(change) = &**message
                && !self.0.unheard_loss
                && !heard_of_the_loss(world, &change.to.members())
            {
                continue;
            }
            actions.push(Action::Deliver(message.clone()));
        }
        for (at, node) in world.nodes.iter().enumerate() {
            if world.is_behind(at) && (node.owner.is_some() || node.takeover.is_some()) {
                actions.push(Action::Follow(at));
            }
            for job in &node.jobs {
                actions.push(Action::CarryOut(at, job.clone(), true));
                if world.left.disk_failures > 0 {
                    actions.push(Action::CarryOut(at, job.clone(), false));
                }
            }
            if node.persisting.is_some() {
                actions.push(Action::Persisted(at));
            }
        }
        if world.left.time > 0 {
            match self.0.time {
                Time::Jumps => actions.push(Action::Jump),
                Time::Ticks => {
                    actions.push(Action::Tick(None));
                    if world.left.misses > 0 {
                        actions.extend((0..3).map(|at| Action::Tick(Some(at))));
                    }
                }
            }
        }
        self.clients(world, actions);
        self.faults(world, actions);
        self.takeovers(world, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let config = &self.0;
        let mut world = last.clone();
        let none = [0; BLOCKS];
        match action {
            Action::Deliver(message) => {
                world.messages.remove(&message);
                world.deliver(config, Message::clone(&message));
            }
            Action::Follow(at) => world.follow(config, at),
            Action::CarryOut(at, job, ok) => {
                world.left.disk_failures -= u8::from(!ok);
                world.node(at).jobs.retain(|other| *other != job);
                world.carry_out(config, at, job, ok);
            }
            Action::Persisted(at) => {
                let durable = world.node(at).persisting.take()?;
                world.node(at).disk.durable = durable;
                world.member(config, at, member::Input::Persisted { ok: true }, None, none);
            }
            Action::Write(at, blocks) => {
                world.left.writes[at] -= 1;
                world.ask(config, at, Asked::Write { blocks });
            }
            Action::Read(at, block) => {
                world.left.reads[at] -= 1;
                world.ask(config, at, Asked::Read { block });
            }
            Action::Flush(at) => {
                world.left.flushes[at] -= 1;
                world.ask(config, at, Asked::Flush);
            }
            Action::Renew(at) => match config.time {
                Time::Jumps => world.renew_at_once(config, at),
                Time::Ticks => {
                    world.left.renewals -= 1;
                    world.owner(config, at, owner::Input::Renew, none);
                }
            },
            Action::Jump => {
                world.left.time -= 1;
                for at in 0..3 {
                    world.node(at).clock += 5;
                    world.takeover(config, at, takeover::Input::Tick, none);
                }
            }
            Action::Tick(paused) => {
                world.left.time -= 1;
                world.left.misses -= u8::from(paused.is_some());
                for at in (0..3).filter(|at| Some(*at) != paused) {
                    world.node(at).clock += 1;
                    world.takeover(config, at, takeover::Input::Tick, none);
                }
            }
            Action::Kill(at, finish) => {
                world.left.kills -= 1;
                world.kill(config, at, finish);
            }
            Action::PowerLoss(at, finish, choice) => {
                world.left.power_losses -= 1;
                world.kill(config, at, finish);
                world.lose_power(config, at, choice);
            }
            Action::SiteLoss(choices) => {
                world.left.site_losses -= 1;
                for (at, choice) in choices.into_iter().enumerate() {
                    world.kill(config, at, false);
                    world.lose_power(config, at, choice);
                }
                world.messages.clear();
            }
            Action::TailLoss => {
                world.left.tail_losses -= 1;
                world.lose_tail(config);
            }
            Action::Fail(at, member) => {
                world.left.failures -= 1;
                world.owner(config, at, owner::Input::MemberFailed(name(member)), none);
            }
            Action::Takeover(at, heard) => {
                world.left.takeovers[at] -= 1;
                world.begin_takeover(config, at, heard);
            }
            Action::Again(at, heard) => {
                world.left.takeovers[at] -= 1;
                world.take_again(config, at, heard);
            }
            Action::Hear(at, heard) => world.hear(config, at, heard),
            Action::Seal(at) => {
                world.left.seals -= 1;
                world.owner(config, at, owner::Input::Seal, none);
            }
            Action::IncomingWrite(at) => world.incoming_write(config, at),
            Action::Join(at) => {
                world.left.joins -= 1;
                let node = name(config.joiner);
                let extent = WHOLE;
                let end = BlockIndex(config.blocks as u64 - 1);
                world.owner(
                    config,
                    at,
                    owner::Input::Join {
                        node,
                        extent,
                        end,
                        blocks: 1,
                        allowed: None,
                    },
                    none,
                );
            }
            Action::Leave(at) => {
                world.left.leaves -= 1;
                world.owner(config, at, owner::Input::Leave(name(config.leaver)), none);
            }
        }
        if config.eager {
            world.settle_log(config);
        }
        tidy(config, &mut world);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::always(ONE_WRITER, |_: &Self, world: &World| world.ghost.holds(ONE_WRITER)),
            Property::always(LINEARIZABLE, |_, world: &World| world.ghost.holds(LINEARIZABLE)),
            Property::always(ONE_ANSWER, |_, world: &World| world.ghost.holds(ONE_ANSWER)),
            Property::always(OUTSIDE, |_, world: &World| world.ghost.holds(OUTSIDE)),
            Property::always(ON_EVERY_MEMBER, |_, world: &World| members_have(world, false)),
            Property::always(DURABLE, |_, world: &World| members_have(world, true)),
            Property::always(ONE_SIDE, |_, world: &World| {
                (0..3).filter(|at| can_write(world, *at)).count() <= 1
            }),
            Property::always(A_COPY, |_, world: &World| {
                let has = |node: &NodeId| world.nodes[number(node)].disk.durable.record.is_some();
                world.ghost.in_force.members().iter().all(has)
            }),
        ];
        use super::ghost::Reached::*;
        macro_rules! sometimes {
            ($($what:ident, $name:literal;)+) => {
                $(if self.0.reach.contains(&$what) {
                    all.push(Property::sometimes($name, |_, world: &World| world.ghost.has_reached($what)));
                })+
            };
        }
        sometimes! {
            TookOver, "a takeover opens";
            WroteAfterTakeover, "a write is acknowledged after a takeover";
            WroteAfterShrink, "a write is acknowledged by a smaller set";
            Joined, "a node joins";
            HandedOver, "a hand-over is done";
            TookAgain, "a destination takes over again";
            WayBack, "a source comes back";
            AllLost, "an image opens after all its members lost power";
            Frozen, "a lost end of the log is noticed";
            Read, "a read is answered";
            Flushed, "a flush is answered";
            Dropped, "a copy is deleted";
        }
        all
    }
}

/// Whether each member of the newest set has what clients may count on.
fn members_have(world: &World, durable: bool) -> bool {
    let ghost = &world.ghost;
    // A log that lost its end may count a grant that no member will take.
    let set = if ghost.lost_tail {
        &ghost.in_force
    } else {
        &ghost.newest
    };
    set.members().iter().map(number).all(|at| {
        let cells = &world.nodes[at].disk.cells;
        cells.iter().zip(&ghost.blocks).all(|(cell, register)| {
            if durable {
                register.floor.contains(&cell.stable)
            } else if ghost.lossy & (1 << at) != 0 {
                register.floor.contains(&cell.now)
            } else {
                register.values().contains(&cell.now)
            }
        })
    })
}

/// Whether a write at this node could be acknowledged if nothing else happened but its messages.
fn can_write(world: &World, at: usize) -> bool {
    let Some(owner) = &world.nodes[at].owner else {
        return false;
    };
    let record = owner.record();
    let admitted = |node: &NodeId| {
        let request = Request {
            id: RequestId(0),
            stamp: record.stamp(),
            store: owner.store_of(node),
            work: Work::Write {
                extent: Extent {
                    last: WHOLE.first,
                    ..WHOLE
                },
                fua: false,
            },
        };
        world.nodes[number(node)].member.admits(&request).is_ok()
    };
    owner.is_open() && owner.needed().iter().all(admitted)
}
