//! Load on any NBD server on a unix socket, from a client that costs as little as can be.
//!
//! One connection, simple replies, requests sent in batches as replies come in. The client may saturate first: then
//! the server's CPU time is the number to look at, and the null server shows the client's own limit.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use hearth_node::export::nbd::proto::{self, be16, be32, be64, command, command_flag, info, option, option_reply};

const REPLY_HEAD_BYTES: usize = 16;

/// What is asked of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Writes instead of reads.
    pub write: bool,
    /// Each write is on stable storage when it is answered.
    pub fua: bool,
    /// One after the other instead of anywhere.
    pub sequential: bool,
    /// Bytes of each request.
    pub length: usize,
    /// Requests in flight.
    pub depth: usize,
}

fn connect(path: &str) -> Result<(UnixStream, u64)> {
    let mut socket = UnixStream::connect(path).with_context(|| format!("connect to {path}"))?;
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting)?;
    ensure!(be64(&greeting, 0) == proto::INIT_MAGIC, "{path} is no NBD server");
    let mut out = 3_u32.to_be_bytes().to_vec();
    // The default export, no information asked for.
    proto::put_option(&mut out, option::GO, &[0; 6]);
    socket.write_all(&out)?;
    let mut size = 0;
    loop {
        let mut head = [0; 20];
        socket.read_exact(&mut head)?;
        let mut data = vec![0; be32(&head, 16) as usize];
        socket.read_exact(&mut data)?;
        match be32(&head, 12) {
            option_reply::ACK => return Ok((socket, size)),
            option_reply::INFO if be16(&data, 0) == info::EXPORT => size = be64(&data, 2),
            option_reply::INFO => {}
            other => anyhow::bail!("the server refuses: {other:#x} {}", String::from_utf8_lossy(&data)),
        }
    }
}

/// User and system time of a process, as the kernel counts it (proc(5): ticks of 10 ms).
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .context("stat has a name")?
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// What one run showed.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Operations per second.
    pub ops_per_s: f64,
    /// Median latency, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// User and system time of the server per operation, microseconds.
    pub server_cpu_us: f64,
}

/// Steps a small generator of random numbers (xorshift64).
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The offsets of a job's requests, one after the other.
struct Places {
    next: u64,
    count: u64,
    job: Job,
}

impl Places {
    fn take(&mut self) -> u64 {
        let place = match self.job.sequential {
            true => {
                self.next += 1;
                self.next
            }
            false => random(&mut self.next),
        };
        place % self.count * self.job.length as u64
    }
}

/// Runs a job for `length` against the default export on the unix socket `path`; `pid` is the server's process.
///
/// # Errors
/// What the server or the socket said.
pub fn run(path: &str, job: Job, length: Duration, pid: u32) -> Result<Figures> {
    let (mut socket, size) = connect(path)?;
    let count = size / job.length as u64;
    ensure!(count > 0, "the export is empty");
    let mut places = Places {
        next: if job.sequential { 0 } else { 0x9e37_79b9_7f4a_7c15 },
        count,
        job,
    };
    let payload = vec![0x5a; if job.write { job.length } else { 0 }];
    let kind = if job.write { command::WRITE } else { command::READ };
    let flags = if job.fua { command_flag::FUA } else { 0 };
    let mut requests = Vec::with_capacity(job.depth * (28 + payload.len()));
    let mut request = |requests: &mut Vec<u8>, slot: usize| {
        let header = proto::request_header(kind, flags, slot as u64, places.take(), job.length as u32);
        requests.extend_from_slice(&header);
        requests.extend_from_slice(&payload);
    };

    let cpu_before = cpu_time(pid)?;
    let start = Instant::now();
    let mut sent_at = vec![start; job.depth];
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    (0..job.depth).for_each(|slot| request(&mut requests, slot));
    socket.write_all(&requests)?;
    let reply_bytes = REPLY_HEAD_BYTES + if job.write { 0 } else { job.length };
    let mut input = vec![0; reply_bytes * job.depth.max(2)];
    let (mut filled, mut done, mut in_flight) = (0, 0_u64, job.depth);
    while in_flight > 0 {
        let got = socket.read(&mut input[filled..])?;
        ensure!(got > 0, "the server hung up");
        filled += got;
        let now = Instant::now();
        let going = now - start < length;
        requests.clear();
        let whole = filled / reply_bytes;
        for reply in input[..whole * reply_bytes].chunks_exact(reply_bytes) {
            ensure!(be32(reply, 0) == proto::SIMPLE_REPLY_MAGIC, "a bad reply");
            ensure!(be32(reply, 4) == 0, "the server answers error {}", be32(reply, 4));
            let slot = be64(reply, 8) as usize;
            latencies.saturating_record((now - sent_at[slot]).as_nanos() as u64 / 100);
            done += 1;
            if going {
                sent_at[slot] = now;
                request(&mut requests, slot);
            } else {
                in_flight -= 1;
            }
        }
        input.copy_within(whole * reply_bytes..filled, 0);
        filled -= whole * reply_bytes;
        socket.write_all(&requests)?;
    }
    let took = start.elapsed();
    let cpu = cpu_time(pid)? - cpu_before;
    let us = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 10.0;
    Ok(Figures {
        ops_per_s: done as f64 / took.as_secs_f64(),
        p50_us: us(0.5),
        p99_us: us(0.99),
        server_cpu_us: cpu.as_secs_f64() * 1e6 / done as f64,
    })
}

/// Writes an export from its first byte to its last with something other than zeroes, so that no server answers reads
/// from a hole.
///
/// # Errors
/// What the server or the socket said.
pub fn fill(path: &str) -> Result<()> {
    const LENGTH: usize = 1 << 20;
    let (mut socket, size) = connect(path)?;
    let mut state = 1;
    let mut data = vec![0u8; LENGTH];
    for offset in (0..size).step_by(LENGTH) {
        for word in data.chunks_exact_mut(8) {
            word.copy_from_slice(&random(&mut state).to_ne_bytes());
        }
        let length = LENGTH.min((size - offset) as usize);
        socket.write_all(&proto::request_header(command::WRITE, 0, 1, offset, length as u32))?;
        socket.write_all(&data[..length])?;
        let mut reply = [0; REPLY_HEAD_BYTES];
        socket.read_exact(&mut reply)?;
        ensure!(
            be32(&reply, 4) == 0,
            "filling: the server answers error {}",
            be32(&reply, 4)
        );
    }
    socket.write_all(&proto::request_header(command::FLUSH, 0, 2, 0, 0))?;
    let mut reply = [0; REPLY_HEAD_BYTES];
    socket.read_exact(&mut reply)?;
    ensure!(
        be32(&reply, 4) == 0,
        "flushing: the server answers error {}",
        be32(&reply, 4)
    );
    Ok(())
}
