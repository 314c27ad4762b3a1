//! The `trace` arm: a recorded block trace as a heat source, window by window of the trace's own time.
//!
//! Format `.vbt.zst`: zstd of 24-byte little-endian records, ordered by time: `ts_us u64`, `offset_bytes u64`,
//! `size_bytes u32`, `volume u16`, `op u8` (0 read, 1 write), one byte of padding.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use hearth_protocol::heat::HeatOrigin;
use hearth_protocol::{ByteLen, ImageId, units};

use crate::source::{HeatError, HeatSource, Op, Window};
use crate::tally::{ImageTally, burst_bit};

const RECORD_BYTES: usize = 24;

/// One request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceRequest {
    /// When it was submitted, microseconds on the trace's clock.
    pub time_us: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Which of the traced disks.
    pub volume: u16,
    /// Which way.
    pub op: Op,
}

impl TraceRequest {
    /// The record as it lies in a trace.
    pub fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[0..8].copy_from_slice(&self.time_us.to_le_bytes());
        record[8..16].copy_from_slice(&self.offset.to_le_bytes());
        record[16..20].copy_from_slice(&self.length.to_le_bytes());
        record[20..22].copy_from_slice(&self.volume.to_le_bytes());
        record[22] = match self.op {
            Op::Read => 0,
            Op::Write => 1,
        };
        record
    }

    fn from_bytes(record: &[u8; RECORD_BYTES]) -> io::Result<Self> {
        let op = match record[22] {
            0 => Op::Read,
            1 => Op::Write,
            other => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("operation {other} is unknown"),
                ));
            }
        };
        let field = |at: usize, bytes: usize| {
            record[at..at + bytes]
                .iter()
                .rev()
                .fold(0u64, |n, b| n << 8 | u64::from(*b))
        };
        Ok(Self {
            time_us: field(0, 8),
            offset: field(8, 8),
            length: field(16, 4) as u32,
            volume: field(20, 2) as u16,
            op,
        })
    }
}

/// The requests of a trace, in order.
pub struct TraceReader {
    input: Box<dyn Read + Send>,
    path: PathBuf,
    number: u64,
    last_us: u64,
    failed: bool,
}

impl TraceReader {
    /// Opens a trace.
    ///
    /// # Errors
    /// [`HeatError::Failed`] if the file cannot be read as zstd.
    pub fn open(path: &Path) -> Result<Self, HeatError> {
        let input = File::open(path)
            .and_then(zstd::Decoder::new)
            .map_err(|error| HeatError::Failed {
                what: format!("opening the trace {}", path.display()),
                source: error.into(),
            })?;
        let input = Box::new(BufReader::with_capacity(1 << 16, input));
        Ok(Self {
            input,
            path: path.into(),
            number: 0,
            last_us: 0,
            failed: false,
        })
    }

    fn read(&mut self) -> io::Result<Option<TraceRequest>> {
        let mut record = [0; RECORD_BYTES];
        let mut filled = 0;
        while filled < RECORD_BYTES {
            match self.input.read(&mut record[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within a record")),
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let request = TraceRequest::from_bytes(&record)?;
        if request.time_us < self.last_us {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not ordered by time"));
        }
        self.last_us = request.time_us;
        self.number += 1;
        Ok(Some(request))
    }
}

impl Iterator for TraceReader {
    type Item = Result<TraceRequest, HeatError>;

    /// The next request; nothing after the first error.
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let read = self.read().map_err(|error| HeatError::Failed {
            what: format!("reading record {} of the trace {}", self.number, self.path.display()),
            source: error.into(),
        });
        self.failed = read.is_err();
        read.transpose()
    }
}

/// Replays a trace: each drain is the next window of the trace's time, whether anything happened in it or not.
pub struct TraceSource {
    requests: std::iter::Peekable<TraceReader>,
    block_size: ByteLen,
    window_us: u64,
    image_of: Box<dyn FnMut(u16) -> ImageId + Send>,
    /// Start of the next window; `None` before the first.
    next_us: Option<u64>,
    /// Counted, and not yet handed out because reading failed.
    images: BTreeMap<ImageId, ImageTally>,
    events_total: u64,
    lost_total: u64,
}

impl TraceSource {
    /// Opens a trace to replay it in windows of `window_ms`; `image_of` names the image that stands for a volume.
    ///
    /// # Errors
    /// [`HeatError::Failed`] if the file cannot be read.
    ///
    /// # Panics
    /// If `block_size` is no power of two between 4 KiB and 4 MiB, or a window has no length.
    pub fn open(
        path: &Path,
        block_size: ByteLen,
        window_ms: u64,
        image_of: impl FnMut(u16) -> ImageId + Send + 'static,
    ) -> Result<Self, HeatError> {
        assert!(units::is_block_size(block_size.get()), "{block_size} is no block size");
        assert!(window_ms > 0, "a window has a length");
        Ok(Self {
            requests: TraceReader::open(path)?.peekable(),
            block_size,
            window_us: window_ms * 1000,
            image_of: Box::new(image_of),
            next_us: None,
            images: BTreeMap::new(),
            events_total: 0,
            lost_total: 0,
        })
    }

    /// Whether every request has been handed out.
    pub fn is_finished(&mut self) -> bool {
        self.requests.peek().is_none()
    }

    /// Time of the trace at which the next window begins, microseconds.
    pub fn next_window_us(&mut self) -> u64 {
        match self.next_us {
            Some(start) => start,
            None => self.window_of_next_request().unwrap_or(0),
        }
    }

    /// Moves on to the window of the next request, past windows in which nothing happened.
    pub fn skip_idle(&mut self) {
        if let Some(start) = self.window_of_next_request() {
            self.next_us = Some(start.max(self.next_us.unwrap_or(0)));
        }
    }

    fn window_of_next_request(&mut self) -> Option<u64> {
        match self.requests.peek() {
            Some(Ok(request)) => Some(request.time_us / self.window_us * self.window_us),
            _ => None,
        }
    }
}

impl HeatSource for TraceSource {
    fn origin(&self) -> HeatOrigin {
        HeatOrigin::Trace
    }

    fn drain(&mut self) -> Result<Window, HeatError> {
        let start_us = self.next_window_us();
        let end_us = start_us + self.window_us;
        let in_window =
            |request: &Result<TraceRequest, _>| !matches!(request, Ok(request) if request.time_us >= end_us);
        while let Some(request) = self.requests.next_if(in_window) {
            let request = request?;
            if request.length == 0 {
                continue;
            }
            let image = (self.image_of)(request.volume);
            let tally = self
                .images
                .entry(image)
                .or_insert_with(|| ImageTally::new(self.block_size));
            let burst = burst_bit((request.time_us - start_us) * 1000);
            tally.events += 1;
            tally.add_request(request.op, request.offset, request.length.into(), burst);
        }
        self.next_us = Some(end_us);
        let images = std::mem::take(&mut self.images);
        self.events_total += images.values().map(|tally| tally.events).sum::<u64>();
        self.lost_total += images.values().map(|tally| tally.lost).sum::<u64>();
        Ok(Window {
            images: images
                .into_iter()
                .map(|(image, tally)| tally.into_window(image))
                .collect(),
            disks: Vec::new(),
            events_total: self.events_total,
            lost_total: self.lost_total,
            untimed_total: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    fn trace(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&zstd::encode_all(bytes, 1).unwrap()).unwrap();
        file
    }

    fn request(time_us: u64, volume: u16, op: Op, offset: u64, length: u32) -> TraceRequest {
        TraceRequest {
            time_us,
            offset,
            length,
            volume,
            op,
        }
    }

    fn sample() -> Vec<TraceRequest> {
        vec![
            request(5_200_000, 0, Op::Read, 0, 4096),
            request(5_350_000, 0, Op::Write, 4095, 2),
            request(5_999_999, 1, Op::Read, 1 << 40, 512),
            request(9_000_000, 0, Op::Read, 8192, 4096),
        ]
    }

    fn bytes(requests: &[TraceRequest]) -> Vec<u8> {
        requests.iter().flat_map(|request| request.to_bytes()).collect()
    }

    fn open(file: &NamedTempFile) -> TraceSource {
        TraceSource::open(file.path(), ByteLen(4096), 1000, |volume| {
            ImageId(100 + u128::from(volume))
        })
        .unwrap()
    }

    #[test]
    fn records_read_back() {
        let file = trace(&bytes(&sample()));
        let read: Result<Vec<_>, _> = TraceReader::open(file.path()).unwrap().collect();
        assert_eq!(read.unwrap(), sample());
    }

    #[test]
    fn windows_follow_the_clock_of_the_trace() {
        let file = trace(&bytes(&sample()));
        let mut source = open(&file);
        assert_eq!(source.next_window_us(), 5_000_000);
        let window = source.drain().unwrap();
        let images: Vec<_> = window.images.iter().map(|image| image.image).collect();
        assert_eq!(images, [ImageId(100), ImageId(101)]);
        let blocks: Vec<_> = window.images[0]
            .blocks
            .iter()
            .map(|b| (b.block.0, b.reads, b.writes, b.bytes, b.bursts))
            .collect();
        assert_eq!(blocks, [(0, 1, 1, 4097, 2), (1, 0, 1, 1, 1)]);
        assert_eq!(window.events_total, 3);
        assert!(
            source.drain().unwrap().images.is_empty(),
            "an idle second is a window too"
        );
        source.skip_idle();
        assert_eq!(source.next_window_us(), 9_000_000);
        assert!(!source.is_finished());
        assert_eq!(source.drain().unwrap().events_total, 4);
        assert!(source.is_finished());
        assert!(source.drain().unwrap().images.is_empty());
    }

    #[test]
    fn damage_is_an_error_that_names_the_record() {
        let good = bytes(&sample());
        let mut unknown = good.clone();
        unknown[24 + 22] = 9;
        let mut unordered = good.clone();
        unordered[3 * 24..][..8].fill(0);
        for (damaged, record) in [(&good[..good.len() - 1], 3), (&unknown[..], 1), (&unordered[..], 3)] {
            let file = trace(damaged);
            let error = TraceReader::open(file.path())
                .unwrap()
                .find_map(Result::err)
                .expect("the trace is damaged");
            assert!(error.to_string().contains(&format!("record {record} of")), "{error}");
        }
    }

    #[test]
    fn every_request_is_in_exactly_one_window() {
        let requests: Vec<_> = (0..20_000u64)
            .map(|i| request(i * i, (i % 3) as u16, Op::Read, i * 7919 % 1000 * 4096, 4096))
            .collect();
        let file = trace(&bytes(&requests));
        let mut source = open(&file);
        let (mut touches, mut events) = (0, 0);
        while !source.is_finished() {
            source.skip_idle();
            let window = source.drain().unwrap();
            touches += window
                .images
                .iter()
                .flat_map(|image| &image.blocks)
                .map(|b| u64::from(b.reads))
                .sum::<u64>();
            events = window.events_total;
        }
        assert_eq!((touches, events), (requests.len() as u64, requests.len() as u64));
    }
}
