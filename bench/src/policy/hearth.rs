//! The production code under a trace: the RAM tier with its front, shadows and prefetchers as the node runs it, and
//! the scheduler's state and decisions, once a second of the trace's time. Only disks, clocks and messages are
//! played: a read ahead arrives [`LATE_US`] after it was asked for, an order is carried out in the tick that gave it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anyhow::Result;
use hearth_node::agent::report::{ImageContext, images};
use hearth_node::tier::prefetch::Sequential;
use hearth_node::tier::{FillToken, Filled, LayerHandle, Look, RamTier, Region, TierOptions};
use hearth_probes::source::{Op, Window};
use hearth_probes::tally::{ImageTally, burst_bit};
use hearth_probes::trace::TraceRequest;
use hearth_protocol::command::{Order, Outcome as Answer};
use hearth_protocol::event::{HeatFolded, ImageAttached, ImageCreated, NodeJoined};
use hearth_protocol::heat::HeatOrigin;
use hearth_protocol::{
    BlockIndex, ByteLen, Command, Epoch, Event, ImageId, Incarnation, LayerId, LeaseId, NodeId, SetVersion, Term,
    WallMs,
};

use super::scheduler::{Input, Scheduler};
use super::trace::Trace;

/// How late a read ahead arrives, microseconds (POLICY).
const LATE_US: u64 = 5_000;

/// Bytes copied out of a block at each look: what is measured is the policy, not memory.
pub const LOOK_BYTES: usize = 64;

/// What came of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Played {
    /// Block reads answered from RAM.
    pub hits: u64,
    /// Blocks read below: misses, reads ahead, promotions.
    pub backing: u64,
    /// Blocks in heat reports.
    pub reported: u64,
    /// Reads of the sample, and how many of them the shadows say a tier without prefetch hits.
    pub predicted: (u64, u64),
    /// Bytes of bookkeeping for each resident block at the end, without ghosts.
    pub resident_bytes: u64,
}

/// A read ahead under way.
struct Pending {
    due_us: u64,
    volume: usize,
    unit: u32,
    class: u8,
    token: FillToken,
}

struct Node {
    tier: Arc<RamTier>,
    layers: Vec<LayerHandle>,
    streams: Vec<Sequential>,
    units: Vec<u32>,
    pending: VecDeque<Pending>,
    data: Vec<u8>,
    ahead: bool,
    unit_bytes: u64,
    played: Played,
}

impl Node {
    /// Fills what arrived by `now_us`.
    fn arrive(&mut self, now_us: u64) {
        while self.pending.front().is_some_and(|p| p.due_us <= now_us) {
            if let Some(p) = self.pending.pop_front() {
                self.fill_ahead(&p);
            }
        }
    }

    fn fill_ahead(&self, p: &Pending) -> Filled {
        let data = &self.data[..self.unit_bytes as usize];
        self.tier
            .fill_ahead(self.layers[p.volume], p.unit, p.token, data, p.class)
    }

    fn want(&mut self, now_us: u64, volume: usize, unit: u32, class: u8) {
        let layer = self.layers[volume];
        let under_way = |p: &Pending| p.volume == volume && p.unit == unit;
        if unit >= self.units[volume] || self.tier.region(layer, unit).is_some() || self.pending.iter().any(under_way) {
            self.tier.unread(class, 1);
            return;
        }
        self.played.backing += 1;
        self.pending.push_back(Pending {
            due_us: now_us + LATE_US,
            volume,
            unit,
            class,
            token: self.tier.begin_fill(layer, unit),
        });
    }

    fn missed(&mut self, now_us: u64, volume: usize, unit: u32) {
        if !self.ahead {
            return;
        }
        if let Some(replayed) = self.tier.missed(self.layers[volume], unit) {
            for (number, unit) in replayed.units {
                let volume = self.layers.iter().position(|l| l.is_number(number));
                self.want(now_us, volume.expect("recorded of one of them"), unit, replayed.class);
            }
        }
    }

    fn read(&mut self, request: &TraceRequest, first: u32, last: u32) {
        let volume = usize::from(request.volume);
        let layer = self.layers[volume];
        let mut buf = [0; LOOK_BYTES];
        for unit in first..=last {
            match self.tier.look(layer, unit, 0, &mut buf) {
                Look::Hit => self.played.hits += 1,
                Look::FirstUse(_) => {
                    self.played.hits += 1;
                    self.missed(request.time_us, volume, unit);
                }
                Look::Miss => {
                    let under_way = |p: &Pending| p.volume == volume && p.unit == unit;
                    if let Some(at) = self.pending.iter().position(under_way) {
                        // The reader waits for the read ahead, as it does for another's read of the same unit.
                        let p = self.pending.remove(at).expect("just found");
                        self.fill_ahead(&p);
                        self.tier.look(layer, unit, 0, &mut buf);
                        self.missed(request.time_us, volume, unit);
                        continue;
                    }
                    let token = self.tier.begin_fill(layer, unit);
                    self.played.backing += 1;
                    let data = &self.data[..self.unit_bytes as usize];
                    self.tier.fill(layer, unit, token, data, Region::Front);
                    self.missed(request.time_us, volume, unit);
                }
            }
        }
        if self.ahead {
            let end = self.units[volume];
            let mut class = 0;
            let wanted = self.streams[volume].observe(first, last, |run, count| {
                let count = count.min(end.saturating_sub(last + 1));
                let (of, granted) = self.tier.grant_sequential(run, count, self.unit_bytes);
                class = of;
                granted
            });
            for unit in wanted {
                self.want(request.time_us, volume, unit, class);
            }
        }
    }

    fn write(&mut self, request: &TraceRequest, first: u32, last: u32) {
        let layer = self.layers[usize::from(request.volume)];
        let ticket = self.tier.begin_write(layer, first, last - first + 1);
        ticket.update(request.offset, &self.data[..request.length as usize]);
        ticket.keep();
    }

    fn obey(&mut self, order: &Order) -> Answer {
        let layer_of = |id: LayerId| self.layers[id.0 as usize - 1];
        let (mut done, mut skipped) = (Vec::new(), Vec::new());
        match order {
            Order::Promote { layer, blocks, .. } => {
                let handle = layer_of(*layer);
                for one in blocks {
                    let unit = one.block.0 as u32;
                    let filled = self.tier.promote_resident(handle, unit).unwrap_or_else(|| {
                        self.played.backing += 1;
                        let token = self.tier.begin_fill(handle, unit);
                        let data = &self.data[..self.unit_bytes as usize];
                        self.tier.fill(handle, unit, token, data, Region::Main)
                    });
                    match filled {
                        Filled::Done | Filled::Present => done.push(one.block),
                        Filled::Stale | Filled::Full => skipped.push((one.block, "main_region_full".into())),
                    }
                }
            }
            Order::Demote { layer, blocks, .. } => {
                let handle = layer_of(*layer);
                for one in blocks {
                    self.tier.demote(handle, one.block.0 as u32);
                    done.push(one.block);
                }
            }
            // One node has nowhere to put a replica; its images have none.
            Order::Replicate { .. } | Order::Drop { .. } => {
                return Answer::Refused {
                    why: "there is one node".into(),
                };
            }
        }
        done.sort();
        Answer::Done {
            bytes: ByteLen(done.len() as u64 * self.unit_bytes),
            done,
            skipped,
            took_us: 0,
        }
    }
}

/// The only node.
pub fn node_id() -> Result<NodeId> {
    Ok("node-1".parse()?)
}

/// Plays a trace against RAM for `room` blocks. `overhear` is shown all that the scheduler hears.
///
/// # Errors
/// There is no memory for the arena.
pub fn play(trace: &Trace, room: usize, ahead: bool, overhear: impl FnMut(&Input)) -> Result<Played> {
    let unit_bytes = 1u64 << trace.block_log;
    let options = TierOptions {
        lock: false,
        ..TierOptions::of_bytes((room as u64 * unit_bytes).max(1 << 16))
    };
    let tier = RamTier::new(options)?;
    let volumes = trace.requests.iter().map(|r| r.volume).max().unwrap_or(0) + 1;
    let mut units = vec![0; usize::from(volumes)];
    for r in &trace.requests {
        let last = (r.offset + u64::from(r.length) - 1) >> trace.block_log;
        let units = &mut units[usize::from(r.volume)];
        *units = (last as u32 + 1).max(*units);
    }
    let layer = |volume: u16| LayerId(u128::from(volume) + 1);
    let longest = trace.requests.iter().map(|r| r.length).max().unwrap_or(0);
    let mut node = Node {
        layers: (0..volumes).map(|v| tier.register(layer(v), unit_bytes)).collect(),
        streams: (0..volumes).map(|_| Sequential::default()).collect(),
        pending: VecDeque::new(),
        data: vec![0; (longest as usize).max(unit_bytes as usize)],
        ahead,
        unit_bytes,
        played: Played::default(),
        units,
        tier,
    };
    let name = node_id()?;
    let mut line = Line {
        scheduler: Scheduler::new(name.clone())?,
        overhear,
        node: name.clone(),
        reports: 0,
    };
    let usage = node.tier.usage();
    line.say(Event::NodeJoined(NodeJoined {
        node: name.clone(),
        incarnation: Incarnation(1),
        storage_incarnation: Incarnation(1),
        previous: None,
        ram: usage.capacity,
        main: usage.main_capacity,
        fault_domain: "rack-1".into(),
        peer_address: "unix:bench".into(),
        layers: Vec::new(),
        heat_source: "export".into(),
    }))?;
    for v in 0..volumes {
        let image = ImageId(u128::from(v) + 1);
        line.say(Event::ImageCreated(ImageCreated {
            image,
            name: format!("trace/vm-{v}").parse()?,
            size: ByteLen(u64::from(node.units[usize::from(v)]) * unit_bytes),
            block_size: ByteLen(unit_bytes),
            layers: vec![layer(v)],
            parent: None,
            node: name.clone(),
            set_version: SetVersion(1),
            members: Default::default(),
        }))?;
        line.say(Event::ImageAttached(ImageAttached {
            image,
            node: name.clone(),
            epoch: Epoch(1),
            lease: LeaseId(1),
            set_version: SetVersion(1),
            device: false,
        }))?;
    }
    let second_of = |us: u64| us / 1_000_000;
    let mut window: BTreeMap<u16, ImageTally> = BTreeMap::new();
    let mut current = trace.requests.first().map_or(0, |r| second_of(r.time_us));
    for request in &trace.requests {
        let second = second_of(request.time_us);
        if second > current {
            node.arrive((current + 1) * 1_000_000);
            tick(&mut node, &mut line, &mut window, current)?;
            current = second;
        }
        let burst = burst_bit((request.time_us - second * 1_000_000) * 1000);
        let tally = window.entry(request.volume);
        let tally = tally.or_insert_with(|| ImageTally::new(ByteLen(unit_bytes)));
        tally.add_request(request.op, request.offset, request.length.into(), burst);
        let first = (request.offset >> trace.block_log) as u32;
        let last = ((request.offset + u64::from(request.length) - 1) >> trace.block_log) as u32;
        node.arrive(request.time_us);
        match request.op {
            Op::Read => node.read(request, first, last),
            Op::Write => node.write(request, first, last),
        }
    }
    node.played.resident_bytes = node.tier.overhead().0;
    node.played.predicted = node.tier.predicted();
    Ok(node.played)
}

/// Node and scheduler in conversation.
struct Line<F> {
    scheduler: Scheduler,
    overhear: F,
    node: NodeId,
    reports: u64,
}

impl<F: FnMut(&Input)> Line<F> {
    fn hear(&mut self, input: Input) -> Result<Vec<Command>> {
        (self.overhear)(&input);
        self.scheduler.hear(input)
    }

    fn say(&mut self, event: Event) -> Result<()> {
        self.hear(Input::Node(Box::new(event))).map(drop)
    }
}

/// One second of the trace ended: report, fold, decide, obey.
fn tick(
    node: &mut Node,
    line: &mut Line<impl FnMut(&Input)>,
    window: &mut BTreeMap<u16, ImageTally>,
    second: u64,
) -> Result<()> {
    let image = |volume: u16| ImageId(u128::from(volume) + 1);
    let counted = Window {
        images: std::mem::take(window)
            .into_iter()
            .map(|(volume, tally)| tally.into_window(image(volume)))
            .collect(),
        ..Window::default()
    };
    node.played.reported += counted.images.iter().map(|i| i.blocks.len() as u64).sum::<u64>();
    let told = images(HeatOrigin::Trace, &counted, |window| {
        let layer = LayerId(window.image.0);
        Some(ImageContext {
            layer_of: Box::new(move |_: BlockIndex| layer),
            ram_hits: 0,
            ram_misses: 0,
        })
    });
    line.reports += 1;
    let time = WallMs((second + 2) * 1_000);
    let heat = HeatFolded {
        term: Term(1),
        node: line.node.clone(),
        incarnation: Incarnation(1),
        reports: (line.reports, line.reports),
        gap: 0,
        time,
        images: told,
        tier: node.tier.usage(),
        disks: Vec::new(),
        probe_events_total: 0,
        probe_lost_total: 0,
        dropped: node.tier.take_dropped(),
    };
    for command in line.hear(Input::Second(Box::new(heat), time))? {
        let outcome = node.obey(&command.order);
        line.say(Event::CommandFinished {
            command: command.id,
            node: command.node,
            outcome,
        })?;
    }
    Ok(())
}
