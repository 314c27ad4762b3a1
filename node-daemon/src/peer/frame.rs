//! Frames: what two nodes say to each other once a connection is theirs, a head and bytes.
//!
//! ```text
//! magic u32 · length of the head u32 · length of the bytes u32 · head · bytes      (big endian)
//! ```
//!
//! Both lengths are checked before anything is read, so a peer that sends garbage costs a connection and no memory. What a
//! frame means is not known here.

use std::io::{self, Read};
use std::sync::Arc;

use crate::export::nbd::buffer::BufferPool;
use crate::shared::Shared;

/// Opens every frame.
const MAGIC: u32 = 0x4872_7450;
/// Bytes of lengths before a head.
pub const PREFIX_BYTES: usize = 12;
/// Longest head: a location map of 4,096 runs, or a million blocks in doubt.
pub const HEAD_BYTES_MAX: usize = 16 << 20;
/// Most bytes: one of the largest NBD requests.
pub const DATA_BYTES_MAX: usize = 32 << 20;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// What is said.
    pub head: Vec<u8>,
    /// The bytes that go with it.
    pub data: Shared,
}

impl Frame {
    /// What comes before head and bytes.
    ///
    /// # Errors
    /// `InvalidInput` for a frame beyond the limits.
    pub fn prefix(&self) -> io::Result<[u8; PREFIX_BYTES]> {
        check(self.head.len(), self.data.len()).map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let mut prefix = [0; PREFIX_BYTES];
        prefix[..4].copy_from_slice(&MAGIC.to_be_bytes());
        prefix[4..8].copy_from_slice(&(self.head.len() as u32).to_be_bytes());
        prefix[8..].copy_from_slice(&(self.data.len() as u32).to_be_bytes());
        Ok(prefix)
    }

    /// Whether bytes begin with a whole frame.
    pub fn is_whole(bytes: &[u8]) -> bool {
        let number = |at: usize| bytes.get(at..at + 4).and_then(|number| number.try_into().ok());
        let length = |at| number(at).map(|number| u32::from_be_bytes(number) as usize);
        match (length(4), length(8)) {
            (Some(head), Some(data)) => bytes.len() - PREFIX_BYTES >= head.saturating_add(data),
            _ => false,
        }
    }

    /// Reads the next one, its bytes into a buffer of `pool`; `None` when the peer closed the connection between two.
    ///
    /// # Errors
    /// `InvalidData` for what is no frame; the socket's.
    pub fn read(from: &mut impl Read, pool: &Arc<BufferPool>) -> io::Result<Option<Self>> {
        let mut prefix = [0; PREFIX_BYTES];
        let mut filled = 0;
        while filled < PREFIX_BYTES {
            match from.read(&mut prefix[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let number = |at: usize| u32::from_be_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]);
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        if number(0) != MAGIC {
            return Err(invalid(format!("{:#010x} does not open a frame", number(0))));
        }
        let (head, data) = (number(4) as usize, number(8) as usize);
        check(head, data).map_err(invalid)?;
        let mut frame = Self {
            head: vec![0; head],
            data: Shared::default(),
        };
        from.read_exact(&mut frame.head)?;
        if data > 0 {
            let mut bytes = pool.take(data);
            from.read_exact(&mut bytes)?;
            frame.data = Shared::of(bytes);
        }
        Ok(Some(frame))
    }
}

fn check(head: usize, data: usize) -> Result<(), String> {
    if head > HEAD_BYTES_MAX || data > DATA_BYTES_MAX {
        return Err(format!(
            "a frame of {head} and {data} bytes: {HEAD_BYTES_MAX} and {DATA_BYTES_MAX} are the limits"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back_and_garbage_ends_the_connection() {
        let pool = BufferPool::new(0);
        let frames = [
            Frame::default(),
            Frame {
                head: b"head".to_vec(),
                data: vec![7; 100_000].into(),
            },
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            let begins = wire.len();
            wire.extend_from_slice(&frame.prefix().unwrap());
            wire.extend_from_slice(&frame.head);
            wire.extend_from_slice(&frame.data);
            assert!(Frame::is_whole(&wire[begins..]));
            assert!(!Frame::is_whole(&wire[begins..wire.len() - 1]));
        }
        let mut rest = wire.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read(&mut rest, &pool).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read(&mut rest, &pool).unwrap(), None);
        for cut in 1..wire.len().min(40) {
            let mut rest = &wire[..cut];
            let read = std::iter::from_fn(|| Frame::read(&mut rest, &pool).transpose());
            let whole = read.take_while(Result::is_ok).count();
            assert!(whole <= 1, "cut at {cut}");
        }
        for at in 0..PREFIX_BYTES {
            let mut bad = wire[..PREFIX_BYTES].to_vec();
            bad[at] ^= 0xff;
            assert!(Frame::read(&mut bad.as_slice(), &pool).is_err(), "byte {at}");
        }
        let huge = Frame {
            head: Vec::new(),
            data: vec![0; DATA_BYTES_MAX + 1].into(),
        };
        assert!(huge.prefix().is_err());
    }
}
