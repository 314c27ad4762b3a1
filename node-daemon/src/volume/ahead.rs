//! Carries out what the prefetcher says, on threads of its own: a guest's read never waits for it.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::Volume;
use super::read::{RUN_BYTES_MAX, RUN_UNITS_MAX};
use super::stack::{Stack, Where};
use super::stats::add;
use crate::disk::DiskError;
use crate::store::direct::{AlignedBuf, with_buffer};
use crate::tier::Replayed;
use crate::tier::prefetch::Sequential;

/// Threads of the process that read ahead: two streams can wait for a disk at once.
const THREADS: usize = 2;

/// Jobs waiting, at most; more are dropped, because a late prefetch is worth nothing.
const QUEUE: usize = 64;

/// Granted guesses of one class; each unit that is not filled is given back.
struct Job {
    volume: Weak<Volume>,
    class: u8,
    wanted: Wanted,
}

enum Wanted {
    /// Units of the image, in a row.
    Run(Range<u32>),
    /// Units by the level they lay in when they were recorded.
    Recorded(Vec<(usize, u32)>),
}

/// One image's prefetcher.
pub(super) struct Ahead {
    streams: Mutex<Sequential>,
    /// The unit touched last: reads within it need no second look.
    last: AtomicU32,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            streams: Mutex::default(),
            last: AtomicU32::new(u32::MAX),
        }
    }
}

/// The way to the threads; they live as long as the process.
fn queue() -> &'static SyncSender<Job> {
    static QUEUE_IN: OnceLock<SyncSender<Job>> = OnceLock::new();
    QUEUE_IN.get_or_init(|| {
        let (sender, receiver) = sync_channel(QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        for i in 0..THREADS {
            let receiver = receiver.clone();
            let spawned = std::thread::Builder::new()
                .name(format!("prefetch-{i}"))
                .spawn(move || serve(&receiver));
            if let Err(err) = spawned {
                tracing::warn!(%err, "cannot start a prefetch thread; sequential reads will be slower");
            }
        }
        sender
    })
}

fn serve(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = receiver.lock().expect("prefetch queue lock").recv();
        let Ok(job) = job else { return };
        if let Some(volume) = job.volume.upgrade()
            && let Err(err) = volume.read_ahead(job.class, job.wanted)
        {
            // The guest's own read will meet the failure and report it.
            tracing::debug!(%err, "prefetch failed");
        }
    }
}

impl Wanted {
    fn len(&self) -> u32 {
        match self {
            Wanted::Run(units) => units.len() as u32,
            Wanted::Recorded(units) => units.len() as u32,
        }
    }
}

impl Volume {
    /// Tells the prefetcher of a read of units `first..=last`, and hands over what it wants. Never waits.
    pub(super) fn note_read(&self, first: u32, last: u32) {
        if first == last && self.ahead.last.load(Ordering::Relaxed) == first {
            return;
        }
        self.ahead.last.store(last, Ordering::Relaxed);
        let Ok(mut streams) = self.ahead.streams.try_lock() else {
            return;
        };
        let units = self.size().div_ceil(self.unit_bytes()) as u32;
        let mut class = 0;
        let wanted = streams.observe(first, last, |run, count| {
            // Never past the image's end.
            let count = count.min(units.saturating_sub(last + 1));
            let (of, granted) = self.tier.grant_sequential(run, count, self.unit_bytes());
            class = of;
            granted
        });
        drop(streams);
        if !wanted.is_empty() {
            let end = wanted.end.min(units).max(wanted.start);
            self.tier.unread(class, wanted.end - end);
            self.send(class, Wanted::Run(wanted.start..end));
        }
    }

    /// Tells the history of a unit that was missed, or would have been, and hands over what followed it last time.
    /// Never waits for a disk.
    pub(super) fn note_missed(&self, stack: &Stack, level: usize, unit: u32) {
        let Some(Replayed { class, units }) = self.tier.missed(stack.handle(level), unit) else {
            return;
        };
        let asked = units.len();
        let mine = |(number, unit)| {
            let level = stack.levels.iter().position(|l| l.handle.is_number(number))?;
            Some((level, unit))
        };
        let units: Vec<_> = units.into_iter().filter_map(mine).collect();
        self.tier.unread(class, (asked - units.len()) as u32);
        self.send(class, Wanted::Recorded(units));
    }

    fn send(&self, class: u8, wanted: Wanted) {
        let job = Job {
            volume: self.me.clone(),
            class,
            wanted,
        };
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = queue().try_send(job) {
            self.tier.unread(class, job.wanted.len());
        }
    }

    fn read_ahead(&self, class: u8, wanted: Wanted) -> Result<(), DiskError> {
        let mut left = wanted.len();
        let done = self.read_wanted(class, wanted, &mut left);
        self.tier.unread(class, left);
        done
    }

    /// Reads what is wanted; `left` counts down the units that were offered to the tier.
    fn read_wanted(&self, class: u8, wanted: Wanted, left: &mut u32) -> Result<(), DiskError> {
        let stack = self.stack();
        match wanted {
            Wanted::Run(units) => {
                let mut unit = units.start;
                while unit < units.end {
                    let filled = self.read_ahead_run(&stack, class, unit, units.end - unit)?;
                    *left -= filled;
                    unit += filled.max(1);
                }
            }
            Wanted::Recorded(units) => {
                let mut units = units.as_slice();
                while let [(level, unit), ..] = *units {
                    // Recorded neighbours are read with one request.
                    let run = units
                        .iter()
                        .zip(unit..)
                        .take_while(|((l, u), next)| *l == level && u == next)
                        .count();
                    units = &units[run..];
                    // Written meanwhile, it lies elsewhere, and the record means other bytes.
                    let same = |unit| matches!(stack.find(self.block_of(unit), 0), Where::Local(l) | Where::Remote(l) if l == level);
                    let (mut at, end) = (unit, unit + run as u32);
                    while at < end {
                        let filled = if same(at) {
                            self.read_ahead_run(&stack, class, at, end - at)?
                        } else {
                            0
                        };
                        *left -= filled;
                        at += filled.max(1);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads units from `unit` on that lie in the same place and are neither in RAM nor on their way; says how many.
    fn read_ahead_run(&self, stack: &Stack, class: u8, unit: u32, count: u32) -> Result<u32, DiskError> {
        thread_local! {
            static RUN: std::cell::RefCell<AlignedBuf> = std::cell::RefCell::default();
        }
        let found = stack.find(self.block_of(unit), 0);
        let (Where::Local(level) | Where::Remote(level)) = found else {
            return Ok(0);
        };
        let handle = stack.handle(level);
        let most = count.min((RUN_BYTES_MAX / self.unit_bytes()) as u32);
        // A lead and a token per unit, on the stack of this call.
        let mut leads = [const { None }; RUN_UNITS_MAX];
        let (mut led, mut bytes) = (0, 0);
        for next in unit..unit + most {
            if stack.find(self.block_of(next), 0) != found || self.tier.region(handle, next).is_some() {
                break;
            }
            let Some(lead) = self.tier.try_lead(handle, next) else {
                break;
            };
            leads[led] = Some((lead, self.tier.begin_fill(handle, next)));
            led += 1;
            bytes += self.unit_len(next);
        }
        if led == 0 {
            return Ok(0);
        }
        with_buffer(&RUN, bytes, |buf| {
            stack.read_from(found, u64::from(unit) * self.unit_bytes(), buf, &*self.remote)?;
            for ((i, part), lead) in buf.chunks(self.unit_bytes() as usize).enumerate().zip(&leads) {
                if let Some((_, token)) = lead {
                    self.tier.fill_ahead(handle, unit + i as u32, *token, part, class);
                }
            }
            Ok::<(), DiskError>(())
        })?;
        add(&self.stats.prefetched, led as u64);
        Ok(led as u32)
    }
}
