//! The tier policy: which blocks the main region of each node's RAM tier holds.
//!
//! POLICY.md has the measurements. A node admits misses into its front by itself; the main region belongs to this
//! policy. Per present node and tick, hottest first:
//! - a block is a *candidate* if reads gave it the threshold's score, a window without losses counted it, and the
//!   node can read its layer;
//! - while there is room it is promoted; when the region is full it must have `margin_percent` of the score of the
//!   coldest residents it displaces, so that two blocks of like heat never change places;
//! - no more bytes than the bandwidth budget of the tick and the in-flight limit allow.
//!
//! Before that: copies in doubt are settled, a region that shrank is emptied to its size, and residents that went
//! cold are demoted though nobody wants their place. Commands of one node are given in this order, and a node executes
//! them in order, so that every demotion precedes the promotion that needs its room.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque, btree_set};
use std::ops::Bound;

use hearth_protocol::command::{Alternative, Demotion, Order, Promotion, Reason, Resident};
use hearth_protocol::limits::{ALTERNATIVES_MAX, BLOCKS_PER_COMMAND_MAX};
use hearth_protocol::{BlockIndex, ByteLen, Command, Epoch, HeatScore, LayerId, NodeId, Seq, SetVersion, TickNo};

use crate::blocks::{LayerBlocks, NodeBlocks};
use crate::decay::Weight;
use crate::orders::{COMMAND_TICKS, command_id};
use crate::state::{Data, Facts, Node};

/// Residents demoted per node and tick because they went cold or into doubt: four commands' worth, so that a policy
/// change cannot stall a node.
const COLD_DEMOTIONS_MAX: usize = 4 * BLOCKS_PER_COMMAND_MAX;

/// Log positions named by one reason, newest kept; every promoted block names its own besides.
const RESTS_ON_MAX: usize = 64;

/// The rule names that commands carry.
pub mod rules {
    /// A hot block takes free room or a colder block's place.
    pub const PROMOTE: &str = "tier/promote";
    /// A resident makes room for a hotter block.
    pub const DISPLACE: &str = "tier/displace";
    /// A resident fell under the policy's least score.
    pub const COLD: &str = "tier/cold";
    /// The region became smaller than what it holds.
    pub const SHRINK: &str = "tier/shrink";
    /// An order expired without an answer; its blocks are taken out, so that the accounts are exact again.
    pub const SETTLE: &str = "tier/settle";
}

/// Commands of one tick, after which no further node is looked at: at some 2 KiB each they keep the log under 8 MiB a
/// second and the decision under a tenth of its second. The nodes left out come first at the next tick.
pub const COMMANDS_PER_TICK_MAX: usize = 4_096;

/// Decides node by node, from the one after the node that was commanded last, in the order of their ids.
pub(crate) fn decide(data: &Data) -> Vec<Command> {
    let mut commands = Vec::new();
    let facts = &data.facts;
    if !facts.policy.enabled || facts.validity.leader().is_none() {
        return commands;
    }
    let nodes = &facts.nodes;
    let after = |last| nodes.range::<NodeId, _>((Bound::Excluded(last), Bound::Unbounded));
    let up_to = |last| nodes.range::<NodeId, _>((Bound::Unbounded, Bound::Included(last)));
    let in_turn: Vec<_> = match &facts.commanded_last {
        Some(last) => after(last).chain(up_to(last)).collect(),
        None => nodes.iter().collect(),
    };
    for (id, node) in in_turn {
        if commands.len() >= COMMANDS_PER_TICK_MAX {
            break;
        }
        if !facts.present(node) {
            continue;
        }
        if let Some(blocks) = data.blocks.get(id) {
            commands.extend(Plan::new(facts, id, node, blocks).run());
        }
    }
    commands
}

/// A layer as one node reads it.
#[derive(Debug, Clone)]
struct Source {
    from: NodeId,
    epoch: Epoch,
    set_version: SetVersion,
}

/// A block in the order of a [`Merge`], with its layer.
#[derive(Debug, Clone, Copy)]
struct Ranked<'a> {
    weight: Weight,
    layer: LayerId,
    block: BlockIndex,
    within: &'a LayerBlocks,
}

impl Ranked<'_> {
    fn bytes(&self) -> u64 {
        self.within.block_bytes
    }
}

/// A block that was chosen.
#[derive(Debug, Clone, Copy)]
struct Chosen<'a> {
    ranked: Ranked<'a>,
    heat_seq: Seq,
    displaces: Option<Resident>,
}

/// The decision for one node.
struct Plan<'a> {
    facts: &'a Facts,
    id: &'a NodeId,
    node: &'a Node,
    blocks: &'a NodeBlocks,
    sources: BTreeMap<LayerId, Source>,
    commands: Vec<Command>,
}

impl<'a> Plan<'a> {
    fn new(facts: &'a Facts, id: &'a NodeId, node: &'a Node, blocks: &'a NodeBlocks) -> Self {
        Self {
            facts,
            id,
            node,
            blocks,
            sources: BTreeMap::new(),
            commands: Vec::new(),
        }
    }

    fn run(mut self) -> Vec<Command> {
        let capacity = self.node.main_capacity();
        let blocks = self.blocks;
        let mut used = blocks.resident_bytes + blocks.arriving_bytes + blocks.doubtful_bytes;
        used -= self.settle();
        let mut residents = Merge::coldest(blocks);
        used -= self.shrink(&mut residents, used.saturating_sub(capacity));
        used -= self.demote_cold(&mut residents);
        self.promote(residents, capacity, capacity.saturating_sub(used));
        self.commands
    }

    /// Takes out what is in doubt; returns the bytes.
    fn settle(&mut self) -> u64 {
        let mut out: BTreeMap<LayerId, Vec<Demotion>> = BTreeMap::new();
        let mut bytes = 0;
        let doubtful = self
            .blocks
            .layers
            .iter()
            .flat_map(|(id, layer)| layer.doubtful.iter().map(move |block| (*id, layer, *block)));
        for (id, layer, block) in doubtful.take(COLD_DEMOTIONS_MAX) {
            let score = layer.cells.get(&block).map_or(HeatScore(0), |c| self.score(c.weight));
            out.entry(id).or_default().push(Demotion { block, score });
            bytes += layer.block_bytes;
        }
        self.give_demotions(out, rules::SETTLE, &[], &[], &[]);
        bytes
    }

    /// Takes out the coldest until `over` bytes are free; returns the bytes.
    fn shrink(&mut self, residents: &mut Merge<'a>, over: u64) -> u64 {
        let mut out: BTreeMap<LayerId, Vec<Demotion>> = BTreeMap::new();
        let (mut bytes, mut count) = (0, 0);
        while bytes < over && count < COLD_DEMOTIONS_MAX {
            let Some(coldest) = residents.next() else {
                break;
            };
            out.entry(coldest.layer).or_default().push(self.demotion(&coldest));
            bytes += coldest.bytes();
            count += 1;
        }
        let numbers = [("over_bytes", over), ("main_capacity_bytes", self.node.main_capacity())];
        self.give_demotions(out, rules::SHRINK, &numbers, &[], &[]);
        bytes
    }

    /// Takes out what is colder than the policy's least score; returns the bytes.
    fn demote_cold(&mut self, residents: &mut Merge<'a>) -> u64 {
        let least = HeatScore(HeatScore::whole(self.facts.policy.demote_below_centibursts).0 / 100);
        let least_weight = self.facts.clock.weight(least);
        let mut out: BTreeMap<LayerId, Vec<Demotion>> = BTreeMap::new();
        let (mut bytes, mut count) = (0, 0);
        while count < COLD_DEMOTIONS_MAX {
            let Some(coldest) = residents.peek().filter(|r| r.weight < least_weight) else {
                break;
            };
            residents.next();
            out.entry(coldest.layer).or_default().push(self.demotion(&coldest));
            bytes += coldest.bytes();
            count += 1;
        }
        self.give_demotions(out, rules::COLD, &[("demote_below_score", least.0)], &[], &[]);
        bytes
    }

    /// Promotes candidates into free room and over colder residents.
    fn promote(&mut self, mut residents: Merge<'a>, capacity: u64, free_before: u64) {
        let policy = &self.facts.policy;
        let per_tick = policy.promote_bytes_per_s_max.saturating_mul(self.facts.tick_ms) / 1_000;
        let in_flight = self.blocks.arriving_bytes;
        let budget = per_tick.min(policy.in_flight_bytes_max.saturating_sub(in_flight));
        let margin = u128::from(policy.margin_percent);
        let coldest = residents.peek().map_or(HeatScore(0), |r| self.score(r.weight));
        let mut free = free_before;
        let mut left = budget;
        let mut chosen: Vec<Chosen<'a>> = Vec::new();
        let mut displaced: BTreeMap<LayerId, Vec<Demotion>> = BTreeMap::new();
        // Written out only if a command is given: in most ticks of a full region nothing pays.
        let mut lost: Vec<(Ranked<'a>, &'static str)> = Vec::with_capacity(ALTERNATIVES_MAX);
        let mut candidates = self.candidates();
        let least_bytes = candidates.orders.iter().map(|(_, layer, _)| layer.block_bytes).min();
        // Victims of the candidate at hand; if it loses they are still the coldest for the next one.
        let mut victims: Vec<Ranked<'a>> = Vec::new();
        while let Some(candidate) = candidates.next() {
            let bytes = candidate.bytes();
            let why = if left < bytes {
                Some("over_budget")
            } else {
                let mut room = free;
                let mut victims_weight: u128 = 0;
                let pays = |victims_weight| u128::from(candidate.weight) * 100 >= victims_weight * margin;
                while room < bytes && pays(victims_weight) {
                    let Some(victim) = residents.next() else {
                        break;
                    };
                    room += victim.bytes();
                    victims_weight += u128::from(victim.weight);
                    victims.push(victim);
                }
                if !pays(victims_weight) {
                    Some("below_margin")
                } else if room < bytes {
                    Some("no_room")
                } else {
                    free = room - bytes;
                    None
                }
            };
            if let Some(why) = why {
                // Too cold for the coldest resident: so are all that follow, and none fits beside it.
                let coldest_stays = why == "below_margin" && victims.len() == 1;
                if coldest_stays && chosen.is_empty() && least_bytes.is_some_and(|least| free < least) {
                    return;
                }
                residents.put_back(&mut victims);
                lost.push((candidate, why));
                // All that follow are colder and every victim is at least as warm: they are looked at only to name
                // the best of them.
                if lost.len() == ALTERNATIVES_MAX {
                    break;
                }
                continue;
            }
            left -= bytes;
            let displaces = victims.first().map(|victim| Resident {
                score: self.score(victim.weight),
                layer: victim.layer,
                block: victim.block,
            });
            for victim in victims.drain(..) {
                displaced.entry(victim.layer).or_default().push(self.demotion(&victim));
            }
            chosen.push(Chosen {
                ranked: candidate,
                heat_seq: candidate.within.cells[&candidate.block].heat_seq,
                displaces,
            });
        }
        if chosen.is_empty() {
            return;
        }
        let takers = || chosen.iter().filter(|c| c.displaces.is_some());
        if let Some(coldest_taker) = takers().next_back() {
            let numbers = [
                ("coldest_taker_score", self.score(coldest_taker.ranked.weight).0),
                ("margin_percent", policy.margin_percent),
                ("main_capacity_bytes", capacity),
            ];
            let rests_on: Vec<Seq> = takers().map(|c| c.heat_seq).collect();
            let stayed: Vec<Alternative> = (0..ALTERNATIVES_MAX)
                .map_while(|_| residents.next())
                .map(|resident| self.alternative(&resident, "hotter_resident_stays"))
                .collect();
            self.give_demotions(displaced, rules::DISPLACE, &numbers, &rests_on, &stayed);
        }
        let numbers = [
            ("threshold_score", self.score(self.facts.floor).0),
            ("margin_percent", policy.margin_percent),
            ("coldest_resident_score", coldest.0),
            ("free_bytes", free_before),
            ("main_capacity_bytes", capacity),
            ("budget_bytes", budget),
            ("in_flight_bytes", in_flight),
        ];
        let lost: Vec<Alternative> = lost.iter().map(|(l, why)| self.alternative(l, why)).collect();
        self.give_promotions(&chosen, &numbers, &lost);
    }

    /// Candidates of all layers that the node can read now.
    fn candidates(&mut self) -> Merge<'a> {
        let mut orders = Vec::new();
        for (id, layer) in &self.blocks.layers {
            if layer.hot.is_empty() {
                continue;
            }
            if let Some(source) = self.source(*id) {
                self.sources.insert(*id, source);
                orders.push((*id, layer, LayerOrder::Hot(layer.hot.iter())));
            }
        }
        Merge::new(orders, true)
    }

    /// Where the node reads a layer from: itself if it holds it, else the present holder with the lowest id. A
    /// growing layer is read only where its image is attached, and only by a node that holds it.
    fn source(&self, id: LayerId) -> Option<Source> {
        let layer = self.facts.catalog.layers.get(&id)?;
        if let Some(image) = layer.growing {
            let image = self.facts.catalog.images.get(&image)?;
            let is_here = image.attached && image.node == *self.id && layer.holders.contains(self.id);
            return is_here.then(|| Source {
                from: self.id.clone(),
                epoch: image.epoch,
                set_version: image.set_version,
            });
        }
        let present = |holder: &&NodeId| self.facts.nodes.get(*holder).is_some_and(|n| self.facts.present(n));
        let from = layer
            .holders
            .get(self.id)
            .or_else(|| layer.holders.iter().find(present))?
            .clone();
        Some(Source {
            from,
            epoch: layer.sealed_at,
            set_version: SetVersion(0),
        })
    }

    fn score(&self, weight: Weight) -> HeatScore {
        self.facts.clock.score(weight)
    }

    fn demotion(&self, resident: &Ranked<'_>) -> Demotion {
        Demotion {
            block: resident.block,
            score: self.score(resident.weight),
        }
    }

    fn alternative(&self, ranked: &Ranked<'_>, why: &str) -> Alternative {
        Alternative {
            layer: ranked.layer,
            block: ranked.block,
            score: self.score(ranked.weight),
            why: why.into(),
        }
    }

    fn block_bytes(&self, layer: LayerId) -> u64 {
        self.blocks.layers.get(&layer).map_or(0, |l| l.block_bytes)
    }

    /// Gives one command per layer and [`BLOCKS_PER_COMMAND_MAX`] blocks. The first carries what lost.
    fn give_demotions(
        &mut self,
        by_layer: BTreeMap<LayerId, Vec<Demotion>>,
        rule: &str,
        numbers: &[(&str, u64)],
        rests_on: &[Seq],
        lost: &[Alternative],
    ) {
        let mut lost = lost;
        for (layer, mut blocks) in by_layer {
            blocks.sort_by_key(|d| (d.score, d.block));
            for part in blocks.chunks(BLOCKS_PER_COMMAND_MAX) {
                let mut all = vec![
                    ("blocks", part.len() as u64),
                    ("coldest_score", part[0].score.0),
                    ("hottest_score", part[part.len() - 1].score.0),
                ];
                all.extend_from_slice(numbers);
                let order = Order::Demote {
                    layer,
                    blocks: part.to_vec(),
                    bytes: ByteLen(self.block_bytes(layer).saturating_mul(part.len() as u64)),
                };
                self.give(order, rule, &all, rests_on.iter().copied(), std::mem::take(&mut lost));
            }
        }
    }

    /// See [`Self::give_demotions`].
    fn give_promotions(&mut self, chosen: &[Chosen<'_>], numbers: &[(&str, u64)], lost: &[Alternative]) {
        // Layers in the order of their hottest block, blocks hottest first.
        let mut by_layer: Vec<(LayerId, Vec<&Chosen<'_>>)> = Vec::new();
        let mut place: BTreeMap<LayerId, usize> = BTreeMap::new();
        for one in chosen {
            let at = *place.entry(one.ranked.layer).or_insert_with(|| {
                by_layer.push((one.ranked.layer, Vec::new()));
                by_layer.len() - 1
            });
            by_layer[at].1.push(one);
        }
        let mut lost = lost;
        for (layer, blocks) in by_layer {
            let source = self.sources[&layer].clone();
            for part in blocks.chunks(BLOCKS_PER_COMMAND_MAX) {
                let mut all = vec![
                    ("blocks", part.len() as u64),
                    ("hottest_score", self.score(part[0].ranked.weight).0),
                    ("coldest_score", self.score(part[part.len() - 1].ranked.weight).0),
                ];
                all.extend_from_slice(numbers);
                let order = Order::Promote {
                    layer,
                    epoch: source.epoch,
                    set_version: source.set_version,
                    from: source.from.clone(),
                    blocks: part
                        .iter()
                        .map(|c| Promotion {
                            block: c.ranked.block,
                            score: self.score(c.ranked.weight),
                            displaces: c.displaces,
                            heat_seq: c.heat_seq,
                        })
                        .collect(),
                    bytes: ByteLen(self.block_bytes(layer).saturating_mul(part.len() as u64)),
                };
                let rests_on = part.iter().map(|c| c.heat_seq);
                self.give(order, rules::PROMOTE, &all, rests_on, std::mem::take(&mut lost));
            }
        }
    }

    fn give(
        &mut self,
        order: Order,
        rule: &str,
        numbers: &[(&str, u64)],
        rests_on: impl Iterator<Item = Seq>,
        lost: &[Alternative],
    ) {
        let rests_on: BTreeSet<Seq> = rests_on.collect();
        let surplus = rests_on.len().saturating_sub(RESTS_ON_MAX);
        let (term, tick) = (self.facts.validity.term(), self.facts.tick);
        let ordinal = self.commands.len() as u64;
        let parts: [&[u8]; 2] = [&ordinal.to_be_bytes(), self.id.as_str().as_bytes()];
        self.commands.push(Command {
            id: command_id("hearth command", term, tick, &parts),
            node: self.id.clone(),
            term,
            tick,
            expires: TickNo(tick.0 + COMMAND_TICKS),
            order,
            reason: Reason {
                rule: rule.into(),
                policy_version: self.facts.policy_version,
                numbers: numbers.iter().map(|(name, value)| ((*name).into(), *value)).collect(),
                rests_on: rests_on.into_iter().skip(surplus).collect(),
                lost: lost.to_vec(),
                lost_nodes: Vec::new(),
            },
        });
    }
}

/// One layer's order.
enum LayerOrder<'a> {
    Hot(btree_set::Iter<'a, (Reverse<Weight>, BlockIndex)>),
    Cold(btree_set::Iter<'a, (Weight, BlockIndex)>),
}

impl Iterator for LayerOrder<'_> {
    type Item = (Weight, BlockIndex);

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            LayerOrder::Hot(iter) => iter.next().map(|(Reverse(weight), block)| (*weight, *block)),
            LayerOrder::Cold(iter) => iter.next().copied(),
        }
    }
}

/// Merges the orders of several layers into one; ties go to the lower layer id, then to the lower block.
struct Merge<'a> {
    orders: Vec<(LayerId, &'a LayerBlocks, LayerOrder<'a>)>,
    /// The head of each order: key, index of the order (ascending by layer id), block.
    heads: BinaryHeap<Reverse<(u64, usize, BlockIndex)>>,
    /// Taken and put back, in order.
    returned: VecDeque<Ranked<'a>>,
    hottest_first: bool,
}

impl<'a> Merge<'a> {
    /// `orders` ascend by layer id.
    fn new(orders: Vec<(LayerId, &'a LayerBlocks, LayerOrder<'a>)>, hottest_first: bool) -> Self {
        let mut merge = Self {
            heads: BinaryHeap::with_capacity(orders.len()),
            orders,
            returned: VecDeque::new(),
            hottest_first,
        };
        (0..merge.orders.len()).for_each(|index| merge.pull(index));
        merge
    }

    fn coldest(blocks: &'a NodeBlocks) -> Self {
        let orders = blocks
            .layers
            .iter()
            .filter(|(_, layer)| !layer.cold.is_empty())
            .map(|(id, layer)| (*id, layer, LayerOrder::Cold(layer.cold.iter())))
            .collect();
        Self::new(orders, false)
    }

    /// A weight as a key that ascends in the order of the merge, and back.
    fn key(&self, weight: u64) -> u64 {
        if self.hottest_first { u64::MAX - weight } else { weight }
    }

    fn pull(&mut self, index: usize) {
        if let Some((weight, block)) = self.orders[index].2.next() {
            self.heads.push(Reverse((self.key(weight), index, block)));
        }
    }

    fn peek(&self) -> Option<Ranked<'a>> {
        if let Some(first) = self.returned.front() {
            return Some(*first);
        }
        let Reverse((key, index, block)) = self.heads.peek()?;
        let (layer, within, _) = &self.orders[*index];
        Some(Ranked {
            weight: self.key(*key),
            layer: *layer,
            block: *block,
            within,
        })
    }

    fn next(&mut self) -> Option<Ranked<'a>> {
        let next = self.peek()?;
        if self.returned.pop_front().is_none()
            && let Some(Reverse((_, index, _))) = self.heads.pop()
        {
            self.pull(index);
        }
        Some(next)
    }

    /// Gives back what was taken last, in the order taken.
    fn put_back(&mut self, taken: &mut Vec<Ranked<'a>>) {
        for one in taken.drain(..).rev() {
            self.returned.push_front(one);
        }
    }
}
