//! The real daemon gets `kill -9` again and again, and nothing acknowledged is lost: fio verifies every block through
//! nbdkit's retry filter; a QEMU guest verifies every page, sees no error, and waits no longer than the daemon is away.
//!
//! `HEARTH_KILLS=100` is the long form; CI kills a few times. `HEARTH_KILL_EVERY_MS` is the time between two deaths
//! (2,000 by default).

mod daemon_support;
mod nbd_support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use daemon_support::{Daemon, IMAGE, Outage};
use nbd_support::have;
use xtask::guest::{Guest, GuestDisk, GuestOptions, Phase, PhaseResult, build_golden, choose};
use xtask::workspace::Workspace;

const MIB: u64 = 1 << 20;

/// Longest that a guest may wait after the daemon serves again: QEMU and the guest must run once more, on a machine
/// that does other things too.
const BEYOND_OUTAGE: Duration = Duration::from_secs(3);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// How long the daemon is gone at least, each time: more than what the guest calls a stall.
const AWAY: Duration = Duration::from_millis(300);

/// Kills the daemon on a schedule until it was killed often enough and the load has ended.
struct Killer {
    thread: std::thread::JoinHandle<(Daemon, Vec<Outage>)>,
    stop: Sender<()>,
}

impl Killer {
    fn start(mut daemon: Daemon, kills: u64) -> Self {
        let every = Duration::from_millis(number("HEARTH_KILL_EVERY_MS", 2_000));
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut outages = Vec::new();
            while outages.len() < kills as usize {
                // The schedule is the test: this waits for the next death, or for a load that failed.
                match stopped.recv_timeout(every) {
                    Err(RecvTimeoutError::Timeout) => outages.push(daemon.die_and_restart(AWAY)),
                    _ => break,
                }
            }
            (daemon, outages)
        });
        Self { thread, stop }
    }

    fn is_done(&self) -> bool {
        self.thread.is_finished()
    }

    fn finish(self) -> (Daemon, Vec<Outage>) {
        drop(self.stop);
        self.thread.join().unwrap()
    }
}

fn longest(outages: &[Outage]) -> Duration {
    outages.iter().map(|o| o.took).max().unwrap_or_default()
}

fn mean_ms(outages: &[Outage]) -> u128 {
    outages.iter().map(|o| o.took.as_millis()).sum::<u128>() / outages.len().max(1) as u128
}

/// nbdkit between fio and the daemon; ended when dropped.
struct Nbdkit(Child);

impl Nbdkit {
    fn start(dir: &Path, daemon: &Daemon) -> Self {
        let child = Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(dir.join("retry.sock"))
            .args(["--filter=retry", "nbd"])
            .arg(format!("socket={}", daemon.socket().display()))
            .arg(format!("export={IMAGE}"))
            .args(["retries=200", "retry-delay=1", "retry-exponential=no"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while !dir.join("retry.sock").exists() {
            assert!(began.elapsed() < Duration::from_secs(30), "nbdkit does not listen");
            std::thread::yield_now();
        }
        Self(child)
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes the whole image in random order and reads it back, each block with a checksum of its own. Says how many
/// blocks were written and how many verified.
fn fio_round(dir: &Path, seed: u64) -> (u64, u64) {
    let output = Command::new("fio")
        .current_dir(dir) // where it leaves its state, whatever it was told
        .args([
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bs=4k",
            "--size=24m",
        ])
        .args([
            "--iodepth=8",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ])
        // Verified while it is written, too; slow enough to span several deaths.
        .args([
            "--verify_backlog=256",
            "--rate_iops=2000",
            "--output-format=json",
            "--allow_file_create=0",
        ])
        .arg("--verify_state_save=0")
        .arg(format!("--randseed={seed}"))
        .arg(format!(
            "--uri=nbd+unix:///?socket={}",
            dir.join("retry.sock").display()
        ))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "fio failed: {}\n{}",
        text,
        String::from_utf8_lossy(&output.stderr)
    );
    let told: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let job = &told["jobs"][0];
    assert_eq!(job["error"], 0, "{job}");
    let count = |what: &str| job[what]["total_ios"].as_u64().unwrap();
    (count("write"), count("read"))
}

#[test]
fn fio_verifies_every_block_while_the_daemon_dies_again_and_again() {
    if !have(&["fio", "nbdkit", "nbdkit --filter=retry nbd --version"]) {
        return;
    }
    let kills = number("HEARTH_KILLS", 3);
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), |store| {
        store.create(&IMAGE.parse().unwrap(), 24 * MIB, 64 << 10).unwrap().id
    });
    let _nbdkit = Nbdkit::start(dir.path(), &daemon);
    let killer = Killer::start(daemon, kills);
    let (mut rounds, mut written, mut verified) = (0, 0, 0);
    while rounds == 0 || !killer.is_done() {
        let (w, v) = fio_round(dir.path(), 4711 + rounds);
        assert!(w >= 24 * MIB / 4096 && v >= w, "{w} written, {v} verified");
        (rounds, written, verified) = (rounds + 1, written + w, verified + v);
    }
    let (_daemon, outages) = killer.finish();
    println!(
        "{} kills; {rounds} rounds of fio, {written} blocks written, {verified} verified by crc32c, 0 errors; outage \
         mean {} ms, longest {} ms",
        outages.len(),
        mean_ms(&outages),
        longest(&outages).as_millis()
    );
    assert_eq!(outages.len() as u64, kills);
}

/// Whether each of a guest's stalls is explained by an outage it overlaps; the worst excess over it.
fn excess(result: &PhaseResult, began: Instant, outages: &[Outage]) -> (Duration, usize) {
    let mut worst = Duration::ZERO;
    let mut during = 0;
    for stall in &result.stalls {
        let from = began + Duration::from_millis(stall.at_ms);
        let took = Duration::from_millis(stall.took_ms);
        let overlapped: Duration = outages
            .iter()
            // The guest's clock starts a little after the host's.
            .filter(|o| o.began < from + took + BEYOND_OUTAGE && from < o.began + o.took)
            .map(|o| o.took)
            .sum();
        during += usize::from(overlapped > Duration::ZERO);
        worst = worst.max(took.saturating_sub(overlapped));
    }
    (worst, during)
}

#[test]
fn a_guest_only_waits_while_the_daemon_dies_again_and_again() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let golden = match build_golden(&Workspace::find().unwrap().cache) {
        Ok(golden) => golden,
        Err(why) => return nbd_support::skip(&format!("no golden image: {why:#}")),
    };
    let kills = number("HEARTH_KILLS", 3);
    let every = Duration::from_millis(number("HEARTH_KILL_EVERY_MS", 2_000));
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), |store| {
        let name = IMAGE.parse().unwrap();
        store.import(&name, &golden, 64 << 10, &mut |_, _| true).unwrap().id
    });
    let mut guest = Guest::boot(&GuestOptions {
        name: "killed".into(),
        disk: GuestDisk::Nbd {
            socket: daemon.socket(),
            export: IMAGE.into(),
        },
        accel: choose().unwrap().0,
        memory_mib: 160,
        console_log: dir.path().join("console.log"),
        qmp_sockets: Vec::new(),
        incoming: false,
    })
    .unwrap();
    println!("{:?}", guest.wait_ready(Duration::from_secs(600)).unwrap());
    // Ends after the last death, which comes later the slower the daemon starts.
    let phase = Phase {
        name: "deaths".into(),
        seconds: every.as_secs_f64() * (kills as f64 * 1.5 + 1.0),
        depth: 4,
        write_permille: 500,
        span_mib: 64,
        ..Phase::default()
    };
    let killer = Killer::start(daemon, kills);
    let began = Instant::now();
    guest.start_phase(&phase).unwrap();
    let result = guest
        .finish_phase(Duration::from_secs_f64(phase.seconds * 3.0 + 300.0))
        .unwrap();
    let (daemon, outages) = killer.finish();
    let (excess, during) = excess(&result, began, &outages);
    println!(
        "{} kills; the guest did {} reads and {} writes, {} errors, {} corrupt; outage mean {} ms, longest {} ms; {} \
         stalls over 100 ms, {during} of them at an outage, the longest {} ms, beyond its outage at most {} ms",
        outages.len(),
        result.reads,
        result.writes,
        result.errors,
        result.corrupt,
        mean_ms(&outages),
        longest(&outages).as_millis(),
        result.stalls.len(),
        result.longest_ms,
        excess.as_millis()
    );
    assert_eq!((result.errors, result.corrupt), (0, 0), "{}", result.first_failure);
    assert!(result.reads > 0 && result.writes > 0);
    assert_eq!(outages.len() as u64, kills, "the phase ended before the last death");
    assert!(during > 0, "no death was felt, so none was proved harmless");
    assert!(
        excess < BEYOND_OUTAGE,
        "an access waited {excess:?} longer than the daemon was away"
    );
    // Its file system is clean, over the same daemon.
    guest.stop(Duration::from_secs(300)).unwrap();
    drop(daemon);
}
