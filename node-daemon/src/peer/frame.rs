//! Frames: what two nodes say to each other once a connection is theirs, a head and bytes.
//!
//! ```text
//! magic u32 · length of the head u32 · length of the bytes u32 · head · bytes      (big endian)
//! ```
//!
//! Both lengths are checked before anything is read, so a peer that sends garbage costs a connection and no memory. What a
//! frame means is not known here.

use std::io::{self, Read, Write};

/// Opens every frame.
const MAGIC: u32 = 0x4872_7450;
/// Bytes of lengths before a head.
const PREFIX_BYTES: usize = 12;
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
    pub data: Vec<u8>,
}

impl Frame {
    /// Writes it.
    ///
    /// # Errors
    /// `InvalidInput` for a frame beyond the limits; the socket's.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        check(self.head.len(), self.data.len()).map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let mut prefix = [0; PREFIX_BYTES];
        prefix[..4].copy_from_slice(&MAGIC.to_be_bytes());
        prefix[4..8].copy_from_slice(&(self.head.len() as u32).to_be_bytes());
        prefix[8..].copy_from_slice(&(self.data.len() as u32).to_be_bytes());
        to.write_all(&prefix)?;
        to.write_all(&self.head)?;
        to.write_all(&self.data)
    }

    /// Reads the next one; `None` when the peer closed the connection between two.
    ///
    /// # Errors
    /// `InvalidData` for what is no frame; the socket's.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
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
            data: vec![0; data],
        };
        from.read_exact(&mut frame.head)?;
        from.read_exact(&mut frame.data)?;
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
        let frames = [
            Frame::default(),
            Frame {
                head: b"head".to_vec(),
                data: vec![7; 100_000],
            },
        ];
        let mut wire = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut wire).unwrap());
        let mut rest = wire.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read(&mut rest).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
        for cut in 1..wire.len().min(40) {
            let mut rest = &wire[..cut];
            let read = std::iter::from_fn(|| Frame::read(&mut rest).transpose());
            let whole = read.take_while(Result::is_ok).count();
            assert!(whole <= 1, "cut at {cut}");
        }
        for at in 0..PREFIX_BYTES {
            let mut bad = wire[..PREFIX_BYTES].to_vec();
            bad[at] ^= 0xff;
            assert!(Frame::read(&mut bad.as_slice()).is_err(), "byte {at}");
        }
        let huge = Frame {
            head: Vec::new(),
            data: vec![0; DATA_BYTES_MAX + 1],
        };
        assert!(huge.write(&mut Vec::new()).is_err());
    }
}
