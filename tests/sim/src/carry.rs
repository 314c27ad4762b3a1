//! The shell: takes what a session wants and carries it out, output by output, as a daemon does.

use hearth_protocol::record::Extent;
use hearth_protocol::{Event as Fact, NodeId, Publisher, subject};
use hearth_replication::owner::{Ask, Denial, OpId, Owner};
use hearth_replication::request::{Bytes, Work};
use hearth_replication::resync::Join;
use hearth_replication::session::{Input, Output};
use hearth_replication::takeover::Setback;

use crate::disk::{Job, Value};
use crate::event::Event;
use crate::log::image_id;
use crate::node::Phase;
use crate::reference::By;
use crate::text::{shown, text, wanted};
use crate::world::{Came, World, value};

/// The first word of a value's debug text: the name of its variant.
pub fn name(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}

impl World {
    /// A session takes an input, and what it wants is carried out.
    pub fn step(&mut self, node: usize, image: usize, input: Input, came: Came) -> Result<(), String> {
        let now = self.nodes[node].clock.reading(self.now_us);
        if !matches!(input, Input::Tick) {
            self.note(|| format!("n{node} i{image} <- {}", shown(&input)));
        }
        let ticked = matches!(input, Input::Tick);
        let Some(shell) = self.shell(node, image) else {
            return Ok(());
        };
        let outputs = shell.session.step(now, input);
        let join = shell.session.owner().and_then(Owner::join);
        shell.copies_changes |= join.is_some_and(Join::copies_changes);
        if let Some(at) = shell.session.wake_at() {
            if at <= now {
                return Err(format!(
                    "n{node} i{image}: woken at {now:?} it asks to be woken at {at:?}"
                ));
            }
            let wakes = shell.wake_us;
            let at_us = self.nodes[node].clock.when(at, self.now_us);
            if wakes.is_none_or(|wakes| at_us < wakes) {
                let life = self.nodes[node].daemon.as_ref().map_or(0, |daemon| daemon.life);
                self.at(at_us, Event::Wake { node, life, image });
                if let Some(shell) = self.shell(node, image) {
                    shell.wake_us = Some(at_us);
                }
            }
        }
        self.counters.steps += 1;
        for output in outputs {
            let Some(daemon) = &mut self.nodes[node].daemon else {
                return Ok(());
            };
            if let Some(left) = &mut daemon.dies_in {
                if *left == 0 {
                    self.counters.count("f2 daemon killed within a step");
                    self.note(|| format!("n{node} dies before {}", wanted(&output)));
                    self.dies(node)?;
                    let us = self.chance.delay(500_000, 5_000_000, 100);
                    self.after(us, Event::Starts { node });
                    return Ok(());
                }
                *left -= 1;
            }
            if ticked || !matches!(output, Output::Perform { .. }) {
                self.note(|| format!("n{node} i{image}  -> {}", wanted(&output)));
            }
            self.carry_out(node, image, output, &came)?;
        }
        Ok(())
    }

    fn values(&mut self, node: usize, image: usize, bytes: &Bytes, came: &Came) -> Result<Vec<Value>, String> {
        let missing = || format!("n{node} i{image}: {bytes:?} did not come with this step");
        match bytes {
            Bytes::None => Ok(Vec::new()),
            Bytes::OfClient(op) => match self.shell(node, image).and_then(|shell| shell.ops.get(op).copied()) {
                Some(Ask::Write { extent, .. }) => Ok(extent.blocks().map(|_| value(*op)).collect()),
                Some(Ask::Read(_)) => Ok(Vec::new()),
                _ => Err(format!("n{node} i{image}: the bytes of {op:?} are not kept any more")),
            },
            Bytes::OfRequest => came.as_ref().map(|(_, _, values)| values.clone()).ok_or_else(missing),
            Bytes::OfAnswer { from, id } | Bytes::OfWork { from, id } => came
                .as_ref()
                .filter(|(of, which, _)| of == from && which == id)
                .map(|(_, _, values)| values.clone())
                .ok_or_else(missing),
        }
    }

    fn carry_out(&mut self, node: usize, image: usize, output: Output, came: &Came) -> Result<(), String> {
        let life = self.nodes[node].starts;
        let disk_us = self.plan.disk_us;
        match output {
            Output::Perform {
                from,
                id,
                work,
                mark,
                anew,
                bytes,
            } => {
                let values = self.values(node, image, &bytes, came)?;
                let job = self.job();
                let us = self.chance.delay(disk_us, 6_000_000, self.plan.slow);
                let Some(disk) = &mut self.nodes[node].disks[image] else {
                    return Err(format!("n{node} i{image}: {work:?} on no copy"));
                };
                let begun = Job {
                    from,
                    id,
                    work,
                    mark,
                    anew,
                    values,
                    until: Vec::new(),
                };
                disk.begin(job, begun)
                    .map_err(|what| format!("n{node} i{image}: {what}"))?;
                self.after(us, Event::Worked { node, life, image, job });
            }
            Output::Persist(durable) => {
                let us = self.chance.delay(disk_us, 2_000_000, self.plan.slow);
                let Some(disk) = &mut self.nodes[node].disks[image] else {
                    return Err(format!("n{node} i{image}: a record on no copy"));
                };
                if disk.persisting.replace(durable).is_some() {
                    return Err(format!("n{node} i{image}: two records at once"));
                }
                self.after(us, Event::Persisted { node, life, image });
            }
            Output::Unmark(blocks) => {
                if let Some(disk) = &mut self.nodes[node].disks[image] {
                    disk.unmark(blocks);
                }
                let us = self.chance.within(0, 1_000_000);
                self.after(us, Event::Tidy { node, image });
            }
            Output::Forget => {
                if self.nodes[node].disks[image]
                    .take()
                    .is_some_and(|disk| !disk.is_quiet())
                {
                    return Err(format!("n{node} i{image}: deleted with work under way"));
                }
                self.counters.count("copy deleted");
            }
            Output::Send { to, message, bytes } => {
                let values = self.values(node, image, &bytes, came)?;
                let to = self.number(&to);
                self.send(node, to, image, message, values);
            }
            Output::Publish(change) => self.publish(node, image, change),
            Output::Compared { op, hashes } => self.compared(node, image, op, &hashes)?,
            Output::Acknowledge { op, bytes } => {
                if self
                    .shell(node, image)
                    .is_some_and(|shell| shell.checks.remove(&op).is_some())
                {
                    self.counters.count("copies written anew");
                    return Ok(());
                }
                let found = self.values(node, image, &bytes, came)?;
                self.acknowledge(node, image, op, &found)?;
            }
            Output::Deny { op, denial } => {
                let Some(shell) = self.shell(node, image) else {
                    return Ok(());
                };
                if shell.held.remove(&op).is_some() || shell.checks.remove(&op).is_some() {
                    return Ok(());
                }
                let ask = shell.ops.remove(&op);
                self.images[image].reference.deny(op)?;
                if let (Denial::Split, Some(Ask::Read(extent))) = (denial, ask) {
                    self.counters.count("read split");
                    for block in extent.blocks() {
                        self.asks(node, image, Ask::Read(Extent::block(block)))?;
                    }
                }
            }
            Output::ReadThrough { op, owner } => {
                let ask = self.shell(node, image).and_then(|shell| shell.held.remove(&op));
                let source = self.number(&owner);
                if let Some(ask) = ask
                    && self.nodes[source].running().is_some()
                {
                    self.counters.count("read through to the source");
                    self.asks(source, image, ask)?;
                }
            }
            Output::Opened => self.opened(node, image)?,
            Output::GivenUp(setback) => {
                self.counters.count(&format!("given up: {}", name(&setback)));
                self.gave_up(node, image);
                if let Setback::RolledBack { .. } = setback {
                    self.note(|| format!("n{node} i{image} rolled back"));
                }
            }
            Output::Ended(denial) => {
                self.counters.count(&format!("ended: {}", name(&denial)));
                if matches!(denial, Denial::Sealed { .. }) {
                    self.counters.count("sealed");
                    let by = self.shell(node, image).and_then(|shell| shell.by.clone());
                    if let Some(by) = by {
                        self.detached(node, image, by.epoch);
                    }
                }
                self.enters(node, image, Phase::Ended);
            }
            Output::Joined(joined) => {
                let Some(shell) = self.shell(node, image) else {
                    return Ok(());
                };
                let (extent, changes) = (shell.joining.take(), std::mem::take(&mut shell.copies_changes));
                if std::mem::take(&mut shell.ordered) {
                    self.counters.count("repaired by policy");
                }
                if changes {
                    self.counters.count("node joined again with what changed");
                }
                if let Some((_, extent)) = extent {
                    self.images[image].reference.has(&joined, extent);
                    let part = extent.first.0 > 0 || extent.last.0 < self.plan.blocks - 1;
                    self.counters
                        .count(if part { "part of an image joined" } else { "node joined" });
                }
            }
            Output::NotChanged {
                denial: Denial::JoinerFailed,
                ..
            } => {
                if let Some(shell) = self.shell(node, image) {
                    shell.copies_changes = false;
                    shell.ordered = false;
                }
                self.counters.count("not changed: JoinerFailed");
            }
            Output::NotChanged { denial, .. } => self.counters.count(&format!("not changed: {}", name(&denial))),
            Output::Left(_) => self.counters.count("member left"),
        }
        Ok(())
    }

    fn enters(&mut self, node: usize, image: usize, phase: Phase) {
        let now_us = self.now_us;
        if let Some(shell) = self.shell(node, image) {
            shell.enter(phase, now_us);
        }
    }

    /// A takeover gave up; a destination goes on by itself.
    fn gave_up(&mut self, node: usize, image: usize) {
        let (now_us, id) = (self.now_us, self.nodes[node].id.clone());
        let Some(shell) = self.shell(node, image) else { return };
        if !shell.session.is_incoming() {
            return shell.enter(Phase::Stalled, now_us);
        }
        shell.gave_up = true;
        shell.enter(Phase::Incoming, now_us);
        let decided = shell.session.aggregate().owner.as_ref() == Some(&id);
        self.counters.count(if decided {
            "destination gave up what the log had decided"
        } else {
            "destination gave up and waits for the next seal"
        });
    }

    fn opened(&mut self, node: usize, image: usize) -> Result<(), String> {
        let now_us = self.now_us;
        let id = self.nodes[node].id.clone();
        let Some(shell) = self.shell(node, image) else {
            return Ok(());
        };
        let record = shell.session.aggregate().record.clone();
        let (epoch, lease) = record.grant();
        let by = By { node: id, epoch, lease };
        shell.by = Some(by.clone());
        shell.enter(Phase::Open, now_us);
        let goes_on = std::mem::take(&mut shell.guest_goes_on);
        let gave_up = std::mem::take(&mut shell.gave_up);
        let held = std::mem::take(&mut shell.held);
        shell.ops.extend(held.iter().map(|(op, ask)| (*op, *ask)));
        if self.images[image].reference.open(&by, &record, goes_on)? {
            self.counters.count("opened after all copies lost power");
        }
        self.counters.count("takeover opened");
        if goes_on {
            self.counters.count("handed over");
        }
        if goes_on && gave_up {
            self.counters.count("handed over after the destination gave up");
        }
        for (op, ask) in held {
            self.counters.count("operation held until open");
            self.images[image].reference.ask(op, ask, epoch);
        }
        self.note(|| format!("n{node} i{image} opened {}", text(&record)));
        Ok(())
    }

    fn acknowledge(&mut self, node: usize, image: usize, op: OpId, found: &[Value]) -> Result<(), String> {
        let Some(shell) = self.shell(node, image) else {
            return Ok(());
        };
        // Where nothing was written, a flush has nothing to do.
        if shell.phase == Phase::Incoming && shell.held.get(&op) == Some(&Ask::Flush) {
            shell.held.remove(&op);
            if shell.held.values().any(|ask| matches!(ask, Ask::Write { .. })) {
                return Err(format!("n{node} i{image}: {op:?} overtakes a write that is held"));
            }
            self.counters.count("flush at a destination");
            return Ok(());
        }
        let (Some(by), Some(ask)) = (shell.by.clone(), shell.ops.remove(&op)) else {
            return Err(format!("n{node} i{image}: {op:?} is answered, but not asked"));
        };
        let wrong = |what| format!("i{image}: {what}");
        self.images[image]
            .reference
            .acknowledge(op, &by, found)
            .map_err(wrong)?;
        match ask {
            Ask::Write { extent, fua } => {
                let kind = if fua {
                    "durable write acknowledged"
                } else {
                    "write acknowledged"
                };
                self.counters.count(kind);
                self.check_members(image, extent)
            }
            Ask::Flush => {
                self.counters.count("flush acknowledged");
                self.check_members(image, self.whole())
            }
            Ask::Read(_) => {
                self.counters.count("read acknowledged");
                Ok(())
            }
        }
    }

    /// Work of a disk ends.
    pub fn worked(&mut self, node: usize, image: usize, job: u64) -> Result<(), String> {
        let here = &mut self.nodes[node];
        let store = here.store();
        let Some(disk) = &mut here.disks[image] else {
            return Ok(());
        };
        let (full, failing) = (here.full, here.failing);
        let Some(work) = disk.job(job).map(|job| job.work.clone()) else {
            return Ok(());
        };
        let fails = match work {
            Work::Write { .. } => full || failing,
            Work::Flush { .. } => failing,
            _ => false,
        };
        here.failing &= !fails || full;
        let ended = disk.end(job, store, fails, &mut self.chance);
        let Some((job, found)) = ended else { return Ok(()) };
        let ok = found.is_some();
        let id = job.id;
        if let Work::Hash(extent) = job.work {
            return self.hashed(node, image, job.from, id, extent, found);
        }
        if fails {
            let torn = matches!(&job.work, Work::Write { extent, .. } if extent.first != extent.last);
            if torn {
                self.counters.count("torn write");
            }
            self.note(|| format!("n{node} i{image}: the disk fails {:?} of {}", job.work, job.from));
        }
        let came = Some((job.from.clone(), id, found.unwrap_or_default()));
        let from = job.from;
        self.step(node, image, Input::Finished { from, id, ok }, came)
    }

    /// A record is durable.
    pub fn persisted(&mut self, node: usize, image: usize) -> Result<(), String> {
        let full = self.nodes[node].full && self.chance.happens(500);
        let Some(disk) = &mut self.nodes[node].disks[image] else {
            return Ok(());
        };
        let Some(durable) = disk.persisting.take() else {
            return Ok(());
        };
        if full {
            disk.failed = true;
        } else {
            disk.durable = durable;
        }
        self.step(node, image, Input::Persisted { ok: !full }, None)
    }

    fn publish(&mut self, node: usize, image: usize, change: hearth_protocol::aggregate::Change) {
        if self.nodes[node].log_cut {
            return;
        }
        let image = image_id(image);
        let publisher = Publisher::Node(self.nodes[node].id.clone());
        let Some(envelope) = self.envelope(node, subject::image(image, &publisher)) else {
            return;
        };
        let fact = Box::new(Fact::LocationsChanged { image, change });
        let us = self.chance.delay(5_000, 500_000, 50);
        if self.plan.faults.contains(&crate::plan::Fault::LogCut) && self.chance.happens(50) {
            // Its outcome is not known for long, and it may come twice.
            let us = self.chance.within(100_000, 10_000_000);
            let (envelope, fact) = (envelope.clone(), fact.clone());
            self.after(us, Event::Posted { envelope, fact });
            if self.chance.happens(500) {
                return;
            }
        }
        self.after(us, Event::Posted { envelope, fact });
    }

    /// A client asks at a node.
    pub fn asks(&mut self, node: usize, image: usize, ask: Ask) -> Result<(), String> {
        let Some(shell) = self.nodes[node].daemon.as_mut().map(|daemon| &mut daemon.shells[image]) else {
            return Ok(());
        };
        let state = &mut self.images[image];
        if let Ask::Write { extent, .. } = ask
            && !state.reference.takes(extent)
        {
            return Ok(());
        }
        state.ops += 1;
        let op = OpId(state.ops);
        let by = shell.by.as_ref().filter(|_| shell.session.is_open());
        if let Some(by) = by {
            state.reference.ask(op, ask, by.epoch);
            shell.ops.insert(op, ask);
        } else {
            shell.held.insert(op, ask);
        }
        self.step(node, image, Input::Client { op, ask }, None)
    }

    /// The whole of an image.
    pub fn whole(&self) -> Extent {
        Extent {
            first: hearth_protocol::BlockIndex(0),
            last: hearth_protocol::BlockIndex(self.plan.blocks - 1),
        }
    }

    /// Whether each member of the newest set has what clients may count on.
    fn check_members(&mut self, image: usize, extent: Extent) -> Result<(), String> {
        let record = self.log.now[image].record.clone();
        for block in extent.blocks() {
            for id in record.members_of(Extent::block(block)) {
                self.check_member(image, block.0, &id)?;
            }
        }
        Ok(())
    }

    fn check_member(&self, image: usize, block: u64, id: &NodeId) -> Result<(), String> {
        let Some(disk) = &self.nodes[self.number(id)].disks[image] else {
            return Err(format!("i{image}: member {id} of block {block} has no copy"));
        };
        let (now, stable) = (disk.now(block), disk.stable(block));
        let checked = self.images[image].reference.check(id, block, now, stable);
        checked.map_err(|what| format!("i{image}: {what}"))
    }
}
