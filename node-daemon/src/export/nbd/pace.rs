//! Keeps an I/O thread awake for a moment while requests follow each other quickly.
//!
//! To put a thread to sleep and wake it again takes longer than to answer a read from RAM, in a virtual machine
//! several times as long. So a thread whose client asked again soon after its last reply goes on looking for the next
//! request for up to [`AWAKE_US_MAX`] before it sleeps, as QEMU's I/O threads do. One that hears of a request now and
//! then sleeps at once, and so does one whose requests wait for a disk: that takes longer, and needs the processor.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Longest time after a reply, microseconds, that a thread stays awake.
const AWAKE_US_MAX: u64 = 100;

/// Of one thread.
struct Pace {
    /// When requests came, or replies left, last.
    last: Cell<Instant>,
    /// Whether the last requests came soon after the replies before them.
    quick: Cell<bool>,
    /// Requests with the workers or the disk.
    elsewhere: Cell<usize>,
    idle: Rc<Notify>,
}

thread_local! {
    static PACE: Pace = Pace {
        last: Cell::new(Instant::now()),
        quick: Cell::new(false),
        elsewhere: Cell::new(0),
        idle: Rc::default(),
    };
}

/// Requests came, at `now`, for a connection of this thread.
pub fn requests_came(now: Instant) {
    PACE.with(|pace| {
        let waited = now - pace.last.replace(now);
        pace.quick.set(waited <= Duration::from_micros(AWAKE_US_MAX));
    });
}

/// Replies left for a connection of this thread: it has nothing to do until the client sends more.
pub fn replies_left() {
    PACE.with(|pace| {
        pace.last.set(Instant::now());
        if pace.quick.get() && pace.elsewhere.get() == 0 {
            pace.idle.notify_one();
        }
    });
}

/// So many requests of this thread's connections went to the workers.
pub fn handed_over(count: usize) {
    PACE.with(|pace| pace.elsewhere.set(pace.elsewhere.get() + count));
}

/// So many came back.
pub fn came_back(count: usize) {
    PACE.with(|pace| pace.elsewhere.set(pace.elsewhere.get() - count));
}

/// Keeps this thread awake when that pays. Never ends.
pub async fn stay_awake() {
    let idle = PACE.with(|pace| Rc::clone(&pace.idle));
    loop {
        idle.notified().await;
        // The runtime looks at every socket of the thread each time around.
        while PACE
            .with(|pace| pace.elsewhere.get() == 0 && pace.last.get().elapsed() <= Duration::from_micros(AWAKE_US_MAX))
        {
            // Whoever waits for this core, other guests' threads among them, goes first.
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
    }
}
