//! Clients of one image that know of every byte which versions a read may return, while faults happen to the image.
//!
//! The image is cut into slots. Each slot is written by one client only, each time with a higher version that fills it.
//! So a read is right exactly if it returns no less than what was acknowledged, or returned by a read, before it was sent,
//! and no more than what was begun; what is less is a lost acknowledged write or a stale read. Behind a power cut no less
//! than what a flush covered. A write that was not answered may be there or not, but once a read showed it, it stays.
//!
//! They go where the image is told to be, begin anew when a connection ends, and count errors that the server answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::wait;

use crate::nbd::{Connection, NoResult};

/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 4096;
/// Slots in a row that belong to one client: half a block of 64 KiB, shifted so that every other row lies in two blocks.
const ROW: u64 = 8;
const ROW_SHIFT: u64 = 4;
/// Clients that write all the time.
const WRITERS: u64 = 4;
/// Visitors at a time.
const VISITORS: u64 = 3;
/// Pause before a server that is not there is tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// What is known of one slot, as versions.
#[derive(Debug, Default)]
struct Slot {
    /// The last one that a write was begun with.
    begun: AtomicU64,
    /// The last acknowledged one.
    acknowledged: AtomicU64,
    /// The last that a read showed or a write had acknowledged: no later read may show less.
    floor: AtomicU64,
    /// The last that a flush covered.
    durable: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    export: String,
    slots: Vec<Slot>,
    /// Where the image is; with its count of changes.
    seat: Mutex<(u64, PathBuf)>,
    stop: AtomicBool,
    /// Whether nothing is made durable.
    careless: AtomicBool,
    visitors: AtomicU64,
    writes: AtomicU64,
    reads: AtomicU64,
    flushes: AtomicU64,
    /// Writes without an answer.
    unknown: AtomicU64,
    /// How often each error was answered.
    refused: Mutex<BTreeMap<u32, u64>>,
    /// What was acknowledged when the power was cut.
    before_cut: Mutex<Vec<u64>>,
    wrong: Mutex<Option<String>>,
}

/// What the clients have seen so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Acknowledged writes.
    pub writes: u64,
    /// Reads that were right.
    pub reads: u64,
    /// Acknowledged flushes.
    pub flushes: u64,
    /// Writes that were never answered, as their connection ended.
    pub unknown: u64,
    /// Errors that were answered, by number.
    pub refused: BTreeMap<u32, u64>,
}

/// Running clients; they end when dropped.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What a visitor met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Visit {
    /// Reads that were answered, rightly.
    pub reads: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Requests that were answered with an error.
    pub refused: u64,
}

impl Clients {
    /// Starts clients of an export over an image of `bytes` that nothing was written to.
    pub fn start(socket: &Path, export: &str, bytes: u64) -> Self {
        let slots = (bytes / SLOT_BYTES / ROW - 1) * ROW;
        let shared = Arc::new(Shared {
            export: export.to_owned(),
            slots: (0..slots).map(|_| Slot::default()).collect(),
            seat: Mutex::new((0, socket.to_owned())),
            stop: AtomicBool::new(false),
            careless: AtomicBool::new(false),
            visitors: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            refused: Mutex::default(),
            before_cut: Mutex::default(),
            wrong: Mutex::default(),
        });
        let run = |number| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || Client::new(shared, number).run())
        };
        let threads = (0..WRITERS).map(run).collect();
        Self { shared, threads }
    }

    /// The image is at another socket now. Requests that are not answered yet are not waited for.
    pub fn go_to(&self, socket: &Path) {
        let mut seat = lock(&self.shared.seat);
        *seat = (seat.0 + 1, socket.to_owned());
    }

    /// Whether the clients ask from now on for nothing to be made durable.
    pub fn be_careless(&self, careless: bool) {
        self.shared.careless.store(careless, SeqCst);
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        let shared = &self.shared;
        Seen {
            writes: shared.writes.load(SeqCst),
            reads: shared.reads.load(SeqCst),
            flushes: shared.flushes.load(SeqCst),
            unknown: shared.unknown.load(SeqCst),
            refused: lock(&shared.refused).clone(),
        }
    }

    /// Fails if a read ever returned what it must not.
    ///
    /// # Errors
    /// What it returned.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.shared.wrong) {
            Some(wrong) => bail!("{wrong}"),
            None => Ok(()),
        }
    }

    /// Waits until so many more writes are acknowledged.
    ///
    /// # Errors
    /// A read was wrong, or they are not acknowledged within that time.
    pub fn go_on(&self, more: u64, within: Duration) -> Result<Duration> {
        let (before, began) = (self.shared.writes.load(SeqCst), Instant::now());
        wait::until("writes to be acknowledged", within, || {
            self.check()?;
            Ok((self.shared.writes.load(SeqCst) >= before + more).then_some(()))
        })
        .with_context(|| format!("seen so far: {:?}", self.seen()))?;
        Ok(began.elapsed())
    }

    /// Fails unless no write is acknowledged for that long.
    ///
    /// # Errors
    /// One was.
    pub fn stand_still(&self, during: Duration) -> Result<()> {
        let before = self.shared.writes.load(SeqCst);
        std::thread::sleep(during);
        let more = self.shared.writes.load(SeqCst) - before;
        ensure!(more == 0, "{more} writes were acknowledged that must not be");
        self.check()
    }

    /// All copies lost what was not flushed: every slot may show any version from the last flushed one on.
    pub fn power_was_cut(&self) {
        let acknowledged = |slot: &Slot| slot.acknowledged.load(SeqCst);
        *lock(&self.shared.before_cut) = self.shared.slots.iter().map(acknowledged).collect();
        for slot in &self.shared.slots {
            let durable = slot.durable.load(SeqCst);
            slot.floor.store(durable, SeqCst);
            slot.acknowledged.store(durable, SeqCst);
        }
    }

    /// How many slots show less than was acknowledged before the power was cut, and are not written since: with none, the
    /// cut took nothing.
    pub fn lost_to_the_cut(&self) -> usize {
        let before = lock(&self.shared.before_cut);
        let slots = self.shared.slots.iter().zip(before.iter());
        slots
            .filter(|(slot, before)| slot.floor.load(SeqCst) < **before)
            .count()
    }

    /// Connects to a socket where the image is; the visitor visits when told to. Few at a time.
    ///
    /// # Errors
    /// The image is not served there.
    pub fn visitor(&self, socket: &Path) -> Result<Visitor> {
        let mut client = Client::new(
            Arc::clone(&self.shared),
            WRITERS + self.shared.visitors.fetch_add(1, SeqCst) % VISITORS,
        );
        match Connection::open(socket, &self.shared.export, &|| true) {
            Ok(connection) => client.connection = Some((u64::MAX, connection)),
            Err(why) => bail!("the image is not served at {}: {why:?}", socket.display()),
        }
        Ok(Visitor(client))
    }

    /// Reads every slot where the image is now.
    ///
    /// # Errors
    /// A slot shows what it must not, or an error.
    pub fn verify(&self, within: Duration) -> Result<()> {
        let mut client = Client::new(Arc::clone(&self.shared), WRITERS + VISITORS);
        let began = Instant::now();
        let rows = self.shared.slots.len() as u64 / ROW;
        for row in 0..rows {
            while let Err(why) = client.read(row * ROW, ROW) {
                ensure!(!matches!(why, NoResult::Refused(_)), "slot {}: {why:?}", row * ROW);
                ensure!(began.elapsed() < within, "slot {} cannot be read: {why:?}", row * ROW);
                std::thread::sleep(AGAIN);
            }
        }
        self.check()
    }

    /// Ends the clients and says what they saw.
    ///
    /// # Errors
    /// A read was wrong.
    pub fn stop(mut self) -> Result<Seen> {
        self.end();
        self.check()?;
        Ok(self.seen())
    }

    fn end(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.end();
    }
}

/// A client that stays with the connection it has, as one does that nobody told of a takeover.
#[derive(Debug)]
pub struct Visitor(Client);

impl Visitor {
    /// Reads what others write, and writes what is its own, until the connection ends or that time is over.
    pub fn visit(self, during: Duration) -> JoinHandle<Visit> {
        let Self(mut client) = self;
        std::thread::spawn(move || {
            let (until, mut met) = (Instant::now() + during, Visit::default());
            client.patient_until = Some(until);
            while Instant::now() < until && client.connection.is_some() {
                let writes = client.random(4) == 0;
                match client.any(writes) {
                    Ok(()) if writes => met.writes += 1,
                    Ok(()) => met.reads += 1,
                    Err(NoResult::Refused(_)) => met.refused += 1,
                    Err(_) => break,
                }
            }
            met
        })
    }
}

#[derive(Debug)]
struct Client {
    shared: Arc<Shared>,
    number: u64,
    version: u64,
    random: u64,
    /// Until when an answer is waited for at most.
    patient_until: Option<Instant>,
    /// With the seat that it was made for.
    connection: Option<(u64, Connection)>,
}

impl Client {
    fn new(shared: Arc<Shared>, number: u64) -> Self {
        Self {
            shared,
            number,
            version: 0,
            random: 0x9e37_79b9_7f4a_7c15 ^ (number + 1),
            patient_until: None,
            connection: None,
        }
    }

    fn run(mut self) {
        let mut step = 0u64;
        while !self.shared.stop.load(SeqCst) {
            step += 1;
            let result = match step % 32 {
                0 if !self.shared.careless.load(SeqCst) => self.flush(),
                odd if odd % 2 == 1 => self.any(true),
                _ => self.any(false),
            };
            if result.is_err() {
                std::thread::sleep(AGAIN);
            }
        }
    }

    /// The next number below `below` of a fixed sequence (xorshift64).
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Reads somewhere, or writes somewhere of its own.
    fn any(&mut self, writes: bool) -> Result<(), NoResult> {
        let rows = self.shared.slots.len() as u64 / ROW;
        let row = self.random(rows);
        let first = self.random(ROW);
        let count = 1 + self.random(ROW - first);
        if writes {
            let each = WRITERS + VISITORS;
            let own = (row / each * each + self.number) % rows;
            let own = if own % each == self.number { own } else { self.number };
            let fua = self.random(16) == 0 && !self.shared.careless.load(SeqCst);
            self.write(own * ROW + first, count, fua)
        } else {
            self.read(row * ROW + first, count)
        }
    }

    /// Sends a request where the image is, over the connection that there is or a new one. `begins` is called when it is
    /// about to be sent.
    fn with<T>(
        &mut self,
        begins: impl FnOnce(),
        ask: impl FnOnce(&mut Connection, &dyn Fn() -> bool) -> Result<T, NoResult>,
    ) -> Result<T, NoResult> {
        let shared = Arc::clone(&self.shared);
        let (seat, socket) = lock(&shared.seat).clone();
        if self
            .connection
            .as_ref()
            .is_some_and(|(made, _)| *made != seat && *made != u64::MAX)
        {
            self.connection = None;
        }
        let at = self.connection.as_ref().map_or(seat, |(made, _)| *made);
        let patient_until = self.patient_until;
        let waits = || {
            let patient = patient_until.is_none_or(|until| Instant::now() < until);
            patient && !shared.stop.load(SeqCst) && (at == u64::MAX || lock(&shared.seat).0 == at)
        };
        let (_, mut connection) = match self.connection.take() {
            Some(made) => made,
            None => (seat, Connection::open(&socket, &shared.export, &waits)?),
        };
        begins();
        let result = ask(&mut connection, &waits);
        if let Err(NoResult::Refused(error)) = &result {
            *lock(&shared.refused).entry(*error).or_default() += 1;
        }
        // Behind an answer the connection is in order; else nobody knows what comes next on it.
        if matches!(result, Ok(_) | Err(NoResult::Refused(_))) {
            self.connection = Some((at, connection));
        }
        result
    }

    fn write(&mut self, first: u64, count: u64, fua: bool) -> Result<(), NoResult> {
        let shared = Arc::clone(&self.shared);
        let slots = &shared.slots[first as usize..(first + count) as usize];
        self.version = slots
            .iter()
            .map(|slot| slot.begun.load(SeqCst))
            .fold(self.version, u64::max)
            + 1;
        let version = self.version;
        let mut data = Vec::with_capacity((count * SLOT_BYTES) as usize);
        for slot in first..first + count {
            fill(&mut data, slot, version);
        }
        let (at, mut sent) = (offset(first), false);
        let begins = || {
            sent = true;
            slots.iter().for_each(|slot| slot.begun.store(version, SeqCst));
        };
        match self.with(begins, |connection, waits| connection.write_at(at, &data, fua, waits)) {
            Ok(()) => {
                for slot in slots {
                    slot.acknowledged.fetch_max(version, SeqCst);
                    slot.floor.fetch_max(version, SeqCst);
                    if fua {
                        slot.durable.fetch_max(version, SeqCst);
                    }
                }
                shared.writes.fetch_add(1, SeqCst);
                Ok(())
            }
            Err(error) => {
                if sent && !matches!(error, NoResult::Refused(_)) {
                    shared.unknown.fetch_add(1, SeqCst);
                }
                Err(error)
            }
        }
    }

    fn flush(&mut self) -> Result<(), NoResult> {
        let shared = Arc::clone(&self.shared);
        let covers: Vec<u64> = shared.slots.iter().map(|slot| slot.acknowledged.load(SeqCst)).collect();
        self.with(|| {}, Connection::flush)?;
        for (slot, version) in shared.slots.iter().zip(covers) {
            slot.durable.fetch_max(version, SeqCst);
        }
        shared.flushes.fetch_add(1, SeqCst);
        Ok(())
    }

    fn read(&mut self, first: u64, count: u64) -> Result<(), NoResult> {
        let shared = Arc::clone(&self.shared);
        let slots = &shared.slots[first as usize..(first + count) as usize];
        let floors: Vec<u64> = slots.iter().map(|slot| slot.floor.load(SeqCst)).collect();
        let mut data = vec![0; (count * SLOT_BYTES) as usize];
        let at = offset(first);
        self.with(|| {}, |connection, waits| connection.read_at(at, &mut data, waits))?;
        let found = data.chunks_exact(SLOT_BYTES as usize);
        for (((slot, floor), bytes), number) in slots.iter().zip(floors).zip(found).zip(first..) {
            let begun = slot.begun.load(SeqCst);
            let right = match version(bytes, number) {
                Some(version) if (floor..=begun).contains(&version) => {
                    slot.floor.fetch_max(version, SeqCst);
                    continue;
                }
                Some(version) => format!("version {version}"),
                None => "bytes that were never written to it in one write".to_owned(),
            };
            let wrong = format!(
                "client {} read {right} of slot {number}; {floor} was acknowledged or read before, {begun} was begun last",
                self.number
            );
            lock(&shared.wrong).get_or_insert(wrong);
        }
        shared.reads.fetch_add(1, SeqCst);
        Ok(())
    }
}

fn offset(slot: u64) -> u64 {
    (slot + ROW_SHIFT) * SLOT_BYTES
}

/// Every 16 bytes say which slot and version they are of.
fn fill(data: &mut Vec<u8>, slot: u64, version: u64) {
    for _ in 0..SLOT_BYTES / 16 {
        data.extend(slot.to_be_bytes());
        data.extend(version.to_be_bytes());
    }
}

/// The version that fills a slot's bytes; 0 if nothing was ever written.
fn version(bytes: &[u8], slot: u64) -> Option<u64> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let version = u64::from_be_bytes(bytes[8..16].try_into().ok()?);
    let mut expected = Vec::with_capacity(bytes.len());
    fill(&mut expected, slot, version);
    (expected == bytes).then_some(version)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
