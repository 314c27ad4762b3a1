//! What moves of replicas leave behind: those under way, those whose gain is not proven yet, what each rule won and cost,
//! and which images were moved in a circle.
//!
//! A move is an order to replicate that names the member it replaces, then an order to drop that one. It is under way from
//! the first order until the record has the new member in sync and no longer the old one. Invariant
//! ([`crate::State::audit`]): everything here is about images that exist and have replicas.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::command::{Command, Order, Outcome};
use hearth_protocol::record::Record;
use hearth_protocol::{CommandId, ImageId, NodeId, TickNo};
use serde::{Deserialize, Serialize};

use crate::catalog::{Image, Replicas};
use crate::mutants;
use crate::orders::COMMAND_TICKS;
use crate::policy::moves::{
    BREAK_TICKS, BREAK_TICKS_MAX, CYCLE_TICKS, DROP_REST_TICKS, LOSING_IN_ROW, OFF_TICKS, SCORE_TICKS,
};
use crate::policy::repair::JOIN_TICKS;
use crate::repairs::At;

/// Ended moves remembered: with two under way at a time and a copy of some seconds each, more than [`CYCLE_TICKS`] hold.
const ENDED_MAX: usize = 8_192;

/// Why a replica moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Rule {
    /// Its node drains.
    Drain,
    /// The guest is on a node without a replica.
    Locality,
    /// Another member is in the same fault domain.
    Spread,
    /// Much more lies on its node than on another.
    Rebalance,
}

impl Rule {
    pub(crate) const ALL: [Rule; 4] = [Rule::Drain, Rule::Locality, Rule::Spread, Rule::Rebalance];

    /// The rule name that its orders to replicate carry.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Rule::Drain => "drain/replicate",
            Rule::Locality => "locality/replicate",
            Rule::Spread => "spread/replicate",
            Rule::Rebalance => "rebalance/replicate",
        }
    }

    /// Whether nobody asked for it.
    pub(crate) const fn is_automatic(self) -> bool {
        !matches!(self, Rule::Drain)
    }
}

/// A move under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Move {
    /// The order to replicate.
    pub command: CommandId,
    pub rule: Rule,
    pub from: NodeId,
    pub to: NodeId,
    pub began: At,
    /// Bytes to be copied, at most.
    pub bytes: u64,
    /// What the order promised, in the unit of its rule.
    pub gain: u64,
    /// The new node stood in the record.
    pub shown: bool,
}

/// An order to drop that the record does not show yet, or the rest after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dropping {
    pub command: CommandId,
    pub from: NodeId,
    /// The last tick in which no further one is given.
    pub until: TickNo,
}

/// A move that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub image: ImageId,
    pub rule: Rule,
    pub from: NodeId,
    pub to: NodeId,
    pub at: TickNo,
    pub gain: u64,
}

/// An image whose replica was moved in a circle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Breaker {
    /// When it tripped last.
    pub at: At,
    /// How often, each within [`CYCLE_TICKS`] of the end of the one before.
    pub trips: u32,
    /// The last tick without automatic moves.
    pub until: TickNo,
}

/// What one rule won and cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Account {
    pub done: u64,
    pub failed: u64,
    pub bytes: u64,
    /// Of the moves that were scored, in the unit of the rule.
    pub predicted: u64,
    pub realised: u64,
    /// Scored moves in a row that won nothing.
    pub in_row: u64,
    /// The last tick in which the rule is off because it lost.
    pub off_until: TickNo,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Moves {
    pub under_way: BTreeMap<ImageId, Move>,
    /// Images that are to have fewer replicas than they have, since when.
    pub surplus: BTreeMap<ImageId, At>,
    pub dropping: BTreeMap<ImageId, Dropping>,
    /// Done and not scored yet, oldest first.
    pub unscored: VecDeque<Ended>,
    /// Automatic ones of the last [`CYCLE_TICKS`], oldest first.
    pub recent: VecDeque<Ended>,
    pub breakers: BTreeMap<ImageId, Breaker>,
    pub ledger: BTreeMap<Rule, Account>,
    /// Images that are served by a node that does not hold all of them, since when.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub away: BTreeMap<ImageId, At>,
    /// The tick at which a node came, came back or started anew, in a cluster with replicas.
    pub came: BTreeMap<NodeId, TickNo>,
}

/// Whether an image has more replicas than wanted, or will once what is being synced is in sync.
pub(crate) fn is_too_many(replicas: &Replicas) -> bool {
    replicas.fewest > replicas.wanted || replicas.fewest == replicas.wanted && !replicas.joiners.is_empty()
}

/// Whether a node holds all of an image, as its record says.
pub(crate) fn holds_all(record: &Record, node: &NodeId) -> bool {
    record.runs().iter().all(|run| run.members.contains(node))
}

impl Moves {
    /// Whether there is nothing to remember.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// An order about an image with replicas was given.
    pub(crate) fn given(&mut self, id: ImageId, command: &Command, replicas: &Replicas, at: At) {
        match &command.order {
            Order::Replicate {
                to, replaces, bytes, ..
            } => {
                let returns = |ended: &Ended| ended.image == id && ended.from == *to;
                if self.recent.iter().any(returns) && !mutants::is_on("circle-unseen") {
                    self.trip(id, at);
                }
                let rule = Rule::ALL.into_iter().find(|rule| rule.name() == command.reason.rule);
                let Some((rule, from)) = rule.zip(replaces.clone()) else {
                    return;
                };
                if from == *to || !replicas.members.contains(&from) {
                    return;
                }
                let numbers = &command.reason.numbers;
                let gain = numbers
                    .iter()
                    .find(|(name, _)| name == "gain")
                    .map_or(0, |(_, gain)| *gain);
                let one = Move {
                    command: command.id,
                    rule,
                    from,
                    to: to.clone(),
                    began: at,
                    bytes: bytes.0,
                    gain,
                    shown: replicas.joiners.contains(to),
                };
                if let Some(before) = self.under_way.insert(id, one) {
                    self.account(before.rule).failed += 1;
                }
            }
            Order::Drop { from, .. } => {
                let dropping = Dropping {
                    command: command.id,
                    from: from.clone(),
                    until: command.expires,
                };
                self.dropping.insert(id, dropping);
            }
            Order::Promote { .. } | Order::Demote { .. } => {}
        }
    }

    fn account(&mut self, rule: Rule) -> &mut Account {
        self.ledger.entry(rule).or_default()
    }

    fn trip(&mut self, id: ImageId, at: At) {
        let trips = self
            .breakers
            .get(&id)
            .map_or(0, |breaker| breaker.trips)
            .saturating_add(1);
        let doubled = BREAK_TICKS.saturating_mul(1u64.checked_shl(trips - 1).unwrap_or(u64::MAX));
        let until = TickNo(at.tick.0.saturating_add(doubled.min(BREAK_TICKS_MAX)));
        self.breakers.insert(id, Breaker { at, trips, until });
    }

    /// The owner answered.
    pub(crate) fn finished(&mut self, id: ImageId, command: CommandId, outcome: &Outcome, tick: TickNo) {
        if let Some(dropping) = self
            .dropping
            .get_mut(&id)
            .filter(|dropping| dropping.command == command)
        {
            dropping.until = TickNo(tick.0.saturating_add(DROP_REST_TICKS));
        }
        let is_refused = matches!(outcome, Outcome::Refused { .. });
        if is_refused
            && self
                .under_way
                .get(&id)
                .is_some_and(|one| one.command == command && !one.shown)
        {
            self.fail(id);
        }
    }

    fn fail(&mut self, id: ImageId) {
        if let Some(one) = self.under_way.remove(&id) {
            self.account(one.rule).failed += 1;
        }
    }

    /// An image's record changed; `image` is as it is now.
    pub(crate) fn located(&mut self, id: ImageId, image: &Image, record: &Record, at: At) {
        let Some(replicas) = &image.replicas else { return };
        let everyone = record.everyone();
        if image.attached && !holds_all(record, &image.node) {
            self.away.entry(id).or_insert(at);
        } else {
            self.away.remove(&id);
        }
        if self
            .dropping
            .get(&id)
            .is_some_and(|dropping| !everyone.contains(&dropping.from))
        {
            self.dropping.remove(&id);
        }
        if !is_too_many(replicas) {
            self.surplus.remove(&id);
        }
        let Some(one) = self.under_way.get_mut(&id) else {
            return;
        };
        one.shown |= everyone.contains(&one.to);
        if holds_all(record, &one.to) && !everyone.contains(&one.from) {
            self.done(id, at.tick);
        } else if one.shown && !everyone.contains(&one.to) {
            self.fail(id);
        } else if holds_all(record, &one.to) && replicas.fewest <= replicas.wanted {
            // Another member went meanwhile, or more are wanted: the new one stands for that, and the old one stays.
            self.fail(id);
        } else if image.node == one.from {
            // The owner keeps its copy: if the new one is there already, another one goes.
            self.fail(id);
            if replicas.fewest > replicas.wanted {
                self.surplus.insert(id, at);
            }
        }
    }

    fn done(&mut self, id: ImageId, tick: TickNo) {
        let Some(one) = self.under_way.remove(&id) else { return };
        let account = self.account(one.rule);
        account.done += 1;
        account.bytes = account.bytes.saturating_add(one.bytes);
        let ended = Ended {
            image: id,
            rule: one.rule,
            from: one.from,
            to: one.to,
            at: tick,
            gain: one.gain,
        };
        for list in [
            Some(&mut self.unscored),
            one.rule.is_automatic().then_some(&mut self.recent),
        ] {
            let Some(list) = list else { continue };
            if list.len() == ENDED_MAX {
                list.pop_front();
            }
            list.push_back(ended.clone());
        }
    }

    /// An image has another owner: what the one before was told counts no more.
    pub(crate) fn owner_changed(&mut self, id: ImageId) {
        self.away.remove(&id);
        self.dropping.remove(&id);
    }

    /// An operator wants another number of replicas.
    pub(crate) fn wanted(&mut self, id: ImageId, replicas: &Replicas, at: At) {
        if is_too_many(replicas) {
            self.surplus.entry(id).or_insert(at);
        } else {
            self.surplus.remove(&id);
        }
    }

    /// Nobody serves an image any more.
    pub(crate) fn detached(&mut self, id: ImageId) {
        self.away.remove(&id);
    }

    pub(crate) fn deleted(&mut self, id: ImageId) {
        self.away.remove(&id);
        self.under_way.remove(&id);
        self.surplus.remove(&id);
        self.dropping.remove(&id);
        self.breakers.remove(&id);
        self.unscored.retain(|ended| ended.image != id);
        self.recent.retain(|ended| ended.image != id);
    }

    /// A tick passed: orders that came to nothing are given up, moves are scored, what is old is forgotten.
    pub(crate) fn ticked(&mut self, tick: TickNo, images: &BTreeMap<ImageId, Image>) {
        let is_late = |one: &Move| tick.0.saturating_sub(one.began.tick.0) > COMMAND_TICKS + JOIN_TICKS;
        // One that stood in the record and is neither being synced nor in sync: its copy ended with its owner.
        let is_idle = |id: &ImageId, one: &Move| {
            let replicas = images.get(id).and_then(|image| image.replicas.as_ref());
            replicas.is_none_or(|r| !r.joiners.contains(&one.to) && r.fewest <= r.wanted)
        };
        let late = self
            .under_way
            .iter()
            .filter(|(id, one)| is_late(one) && (!one.shown || is_idle(id, one)));
        let late: Vec<ImageId> = late.map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.fail(id));
        let age = |ended: &Ended| tick.0.saturating_sub(ended.at.0);
        while let Some(ended) = self.unscored.pop_front_if(|ended| age(ended) >= SCORE_TICKS) {
            let replicas = images.get(&ended.image).and_then(|image| image.replicas.as_ref());
            let stayed = replicas.is_some_and(|r| r.members.contains(&ended.to) && !r.members.contains(&ended.from));
            self.score(&ended, stayed, tick);
        }
        while self.recent.pop_front_if(|ended| age(ended) >= CYCLE_TICKS).is_some() {}
        self.dropping.retain(|_, dropping| dropping.until >= tick);
        self.breakers
            .retain(|_, breaker| tick.0 <= breaker.until.0.saturating_add(CYCLE_TICKS));
    }

    /// A move won what it promised if its replica is still where it was put.
    fn score(&mut self, ended: &Ended, stayed: bool, tick: TickNo) {
        let account = self.account(ended.rule);
        account.predicted = account.predicted.saturating_add(ended.gain);
        if stayed {
            account.realised = account.realised.saturating_add(ended.gain);
            account.in_row = 0;
            return;
        }
        account.in_row += 1;
        if ended.rule.is_automatic() && account.in_row.is_multiple_of(LOSING_IN_ROW) {
            account.off_until = TickNo(tick.0.saturating_add(OFF_TICKS));
        }
    }

    /// Whether a rule is off because its moves won nothing.
    pub(crate) fn is_off(&self, rule: Rule, tick: TickNo) -> bool {
        self.ledger
            .get(&rule)
            .is_some_and(|account| account.off_until >= tick && account.off_until.0 > 0)
    }

    /// Whether an image is not moved by itself now, because it went in a circle.
    pub(crate) fn is_broken(&self, id: ImageId, tick: TickNo) -> bool {
        self.breakers.get(&id).is_some_and(|breaker| breaker.until >= tick)
    }
}
