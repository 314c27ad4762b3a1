//! An image with replicas as its exports see it, while this node owns it.
//!
//! Operations are split where the location map's runs meet, because each run is read from a node that holds it, and zeros
//! in steps, so that a trim of a whole disk does not keep every write waiting.

use std::sync::Arc;

use hearth_protocol::ImageId;
use hearth_replication::owner::{Ask, Denial};

use super::image::Replica;
use super::piece::{Body, Piece};
use super::turns::Turns;
use crate::disk::{Begun, Change, Disk, DiskError, Extent, ExtentKind};

/// Bytes zeroed by one operation; a multiple of every block size.
const ZERO_STEP: u64 = 64 << 20;

/// See the module.
pub struct ReplicatedDisk {
    replica: Arc<Replica>,
    turns: Arc<Turns>,
}

impl ReplicatedDisk {
    /// The image as a disk.
    pub fn new(replica: Arc<Replica>) -> Self {
        let turns = Turns::new(Arc::clone(&replica));
        Self { replica, turns }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let size = self.replica.shape().size;
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(DiskError::OutOfRange { offset, length, size }),
        }
    }

    /// The parts of a range that lie in one run each.
    fn runs(&self, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let shape = self.replica.shape();
        let extent = shape.extent(offset, length);
        let starts: Vec<u64> = self.replica.look(|session| {
            let record = session.record();
            record.map_or_else(Vec::new, |record| {
                let touched = record.touched(extent).skip(1);
                touched.map(|run| run.first.0 * shape.block_size).collect()
            })
        });
        let mut parts = Vec::with_capacity(starts.len() + 1);
        let mut at = offset;
        for start in starts.into_iter().chain([offset + length]) {
            parts.push((at, start - at));
            at = start;
        }
        parts
    }

    fn write_body(&self, offset: u64, body: Body, fua: bool) -> Result<(), DiskError> {
        let extent = self.replica.shape().extent(offset, body.length());
        let piece = Piece { offset, body };
        self.replica
            .ask(Ask::Write { extent, fua }, Some(piece))
            .map(drop)
            .map_err(denied)
    }

    fn zero(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError> {
        self.check(offset, length)?;
        let mut at = offset;
        while at < offset + length {
            let next = ((at / ZERO_STEP + 1) * ZERO_STEP).min(offset + length);
            let body = Body::Zeros {
                length: next - at,
                keep_allocated,
            };
            self.write_body(at, body, fua)?;
            at = next;
        }
        Ok(())
    }
}

pub(super) fn denied(denial: Denial) -> DiskError {
    match denial {
        Denial::NoRoom => DiskError::NoSpace(denial.to_string()),
        Denial::Detached | Denial::Sealed { .. } => DiskError::ShuttingDown,
        other => DiskError::Poisoned(other.to_string()),
    }
}

impl Disk for ReplicatedDisk {
    fn image(&self) -> ImageId {
        self.replica.image()
    }

    fn size_bytes(&self) -> u64 {
        self.replica.shape().size
    }

    fn block_size_bytes(&self) -> u64 {
        self.replica.shape().block_size
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.replica.read_ram(offset, buf)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        for (at, length) in self.runs(offset, buf.len() as u64) {
            let part = &mut buf[(at - offset) as usize..][..length as usize];
            let wanted = Piece {
                offset: at,
                body: Body::Wanted(length),
            };
            let ask = Ask::Read(self.replica.shape().extent(at, length));
            match self
                .replica
                .ask(ask, Some(wanted))
                .map_err(denied)?
                .map(|piece| piece.body)
            {
                Some(Body::Data(bytes)) if bytes.len() == part.len() => part.copy_from_slice(&bytes),
                Some(Body::Zeros { length: zeros, .. }) if zeros == length => part.fill(0),
                _ => {
                    return Err(DiskError::Io {
                        what: format!("a member answered {length} bytes at {at} with something else"),
                        source: std::io::ErrorKind::InvalidData.into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), DiskError> {
        self.check(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        self.write_body(offset, Body::Data(data.to_vec().into()), fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.replica.ask(Ask::Flush, None).map(drop).map_err(denied)
    }

    fn takes_batches(&self) -> bool {
        true
    }

    fn begin(&self, changes: Vec<Begun>) {
        let mut sound = Vec::with_capacity(changes.len());
        for begun in changes {
            if let Change::Write { offset, data, .. } = &begun.change
                && let Some(ended) = match self.check(*offset, data.len() as u64) {
                    Ok(()) if data.is_empty() => Some(Ok(())),
                    Ok(()) => None,
                    Err(error) => Some(Err(error)),
                }
            {
                (begun.tell)(ended);
            } else {
                sound.push(begun);
            }
        }
        self.turns.begin(sound);
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), DiskError> {
        self.zero(offset, length, false, fua)
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError> {
        self.zero(offset, length, keep_allocated, fua)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check(offset, length)?;
        match self.replica.copy() {
            Some(copy) => copy.volume.cache(offset, length),
            None => Ok(()),
        }
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        self.check(offset, length)?;
        let me = self.replica.me();
        let extent = self.replica.shape().extent(offset, length);
        let whole = self
            .replica
            .look(|session| session.record().is_some_and(|record| record.holds(me, extent)));
        match self.replica.copy() {
            Some(copy) if whole => copy.volume.extents(offset, length, kind, extents_max),
            // What lies on other nodes is taken for data there: nothing is lost by reading it.
            _ => {
                let status = match kind {
                    ExtentKind::Allocation | ExtentKind::Synced | ExtentKind::Heat => 0,
                    ExtentKind::Tier => 2,
                };
                Ok(vec![Extent { length, status }])
            }
        }
    }
}
