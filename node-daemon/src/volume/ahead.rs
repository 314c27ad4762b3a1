//! Carries out what the prefetcher says, on threads of its own: a guest's read never waits for it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::Volume;
use super::stack::{Stack, Where};
use super::stats::add;
use crate::disk::DiskError;
use crate::store::direct::{AlignedBuf, with_buffer};
use crate::tier::LayerHandle;
use crate::tier::prefetch::{Prefetch, Sequential};

/// Threads of the process that read ahead: two streams can wait for a disk at once.
const THREADS: usize = 2;

/// Jobs waiting, at most; more are dropped, because a late prefetch is worth nothing.
const QUEUE: usize = 64;

/// Bytes read below with one request.
const RUN_BYTES_MAX: u64 = 1 << 20;

/// The same in units, which have 4,096 bytes or more.
const RUN_UNITS_MAX: usize = (RUN_BYTES_MAX / 4096) as usize;

struct Job {
    volume: Weak<Volume>,
    first: u32,
    count: u32,
}

/// One image's prefetcher.
pub(super) struct Ahead {
    policy: Mutex<Box<dyn Prefetch>>,
    /// The unit touched last: reads within it need no second look.
    last: AtomicU32,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            policy: Mutex::new(Box::new(Sequential::default())),
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
            && let Err(err) = volume.read_ahead(job.first, job.count)
        {
            // The guest's own read will meet the failure and report it.
            tracing::debug!(%err, "prefetch failed");
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
        let distance_max = self.tier.ahead_max(self.unit_bytes());
        if distance_max == 0 {
            return;
        }
        let Ok(mut policy) = self.ahead.policy.try_lock() else {
            return;
        };
        let wanted = policy.observe(first, last, distance_max);
        drop(policy);
        if wanted.is_empty() {
            return;
        }
        let units = self.size().div_ceil(self.unit_bytes()) as u32;
        let end = wanted.end.min(units);
        if wanted.start < end {
            let job = Job {
                volume: self.me.clone(),
                first: wanted.start,
                count: end - wanted.start,
            };
            let _ = queue().try_send(job);
        }
    }

    fn read_ahead(&self, first: u32, count: u32) -> Result<(), DiskError> {
        let stack = self.stack();
        let mut unit = first;
        while unit < first + count {
            let found = stack.find(self.block_of(unit), 0);
            let (Where::Local(level) | Where::Remote(level)) = found else {
                unit += 1;
                continue;
            };
            let handle = stack.handle(level);
            unit += self
                .read_ahead_run(&stack, found, handle, unit, first + count - unit)?
                .max(1);
        }
        Ok(())
    }

    /// Reads units from `unit` on that lie in the same place and are neither in RAM nor on their way; says how many.
    fn read_ahead_run(
        &self,
        stack: &Stack,
        found: Where,
        handle: LayerHandle,
        unit: u32,
        count: u32,
    ) -> Result<u32, DiskError> {
        thread_local! {
            static RUN: std::cell::RefCell<AlignedBuf> = std::cell::RefCell::default();
        }
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
                    self.tier.fill_ahead(handle, unit + i as u32, *token, part);
                }
            }
            Ok::<(), DiskError>(())
        })?;
        add(&self.stats.prefetched, led as u64);
        Ok(led as u32)
    }
}
