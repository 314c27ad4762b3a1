//! Random 4 KiB reads against any NBD server on a unix socket, from a client that costs as little as can be.
//!
//! One connection, simple replies, requests sent in batches as replies come in. The client may saturate first: then
//! the server's CPU time is the number to look at.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use hearth_node::export::nbd::proto::{self, be16, be32, be64, command, info, option, option_reply};

const READ_BYTES: usize = 4_096;
const REPLY_BYTES: usize = 16 + READ_BYTES;

fn connect(path: &str, export: &str) -> Result<(UnixStream, u64)> {
    let mut socket = UnixStream::connect(path).with_context(|| format!("connect to {path}"))?;
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting)?;
    ensure!(be64(&greeting, 0) == proto::INIT_MAGIC, "{path} is no NBD server");
    let mut out = 3_u32.to_be_bytes().to_vec();
    let data = [&(export.len() as u32).to_be_bytes(), export.as_bytes(), &[0, 0]].concat();
    proto::put_option(&mut out, option::GO, &data);
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
fn cpu_time(pid: &str) -> Result<Duration> {
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

/// Reads for `length` at `depth` from `export` on the unix socket `path`; `pid` is the server's process.
///
/// # Errors
/// What the server or the socket said.
pub fn run(path: &str, export: &str, depth: usize, length: Duration, pid: u32) -> Result<Figures> {
    let pid = pid.to_string();
    let (mut socket, size) = connect(path, export)?;
    let pages = size / READ_BYTES as u64;
    ensure!(pages > 0, "the export is empty");

    let cpu_before = cpu_time(&pid)?;
    let start = Instant::now();
    let mut sent_at = vec![start; depth];
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut requests = Vec::with_capacity(depth * 28);
    let mut request = |requests: &mut Vec<u8>, slot: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % pages * READ_BYTES as u64;
        let header = proto::request_header(command::READ, 0, slot as u64, offset, READ_BYTES as u32);
        requests.extend_from_slice(&header);
    };
    (0..depth).for_each(|slot| request(&mut requests, slot));
    socket.write_all(&requests)?;
    let mut input = vec![0; REPLY_BYTES * depth.max(2)];
    let (mut filled, mut done, mut in_flight) = (0, 0_u64, depth);
    while in_flight > 0 {
        filled += socket.read(&mut input[filled..])?;
        let now = Instant::now();
        let going = now - start < length;
        requests.clear();
        let whole = filled / REPLY_BYTES;
        for reply in input[..whole * REPLY_BYTES].chunks_exact(REPLY_BYTES) {
            ensure!(
                be32(reply, 0) == proto::SIMPLE_REPLY_MAGIC && be32(reply, 4) == 0,
                "a bad reply"
            );
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
        input.copy_within(whole * REPLY_BYTES..filled, 0);
        filled -= whole * REPLY_BYTES;
        socket.write_all(&requests)?;
    }
    let took = start.elapsed();
    let cpu = cpu_time(&pid)? - cpu_before;
    let us = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 10.0;
    Ok(Figures {
        ops_per_s: done as f64 / took.as_secs_f64(),
        p50_us: us(0.5),
        p99_us: us(0.99),
        server_cpu_us: cpu.as_secs_f64() * 1e6 / done as f64,
    })
}
