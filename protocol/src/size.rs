//! Sizes as people write them: IEC units, in and out.

use std::fmt::Write as _;
use std::str::FromStr;

use crate::units::ByteLen;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a size: write a whole number with KiB, MiB, GiB or TiB (K, M, G, T mean the same), such as 64KiB or 4GiB"
)]
pub struct SizeError {
    text: String,
}

const UNITS: [(&str, u32); 4] = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];

impl FromStr for ByteLen {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError {
            text: text.chars().take(80).collect(),
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = text[..digits].parse().map_err(|_| error())?;
        let unit = text[digits..].trim_start();
        let shift = match unit {
            "" | "B" => 0,
            _ => {
                let letter = unit.strip_suffix("iB").unwrap_or(unit);
                UNITS.iter().find(|(name, _)| *name == letter).ok_or_else(error)?.1
            }
        };
        number
            .checked_shl(shift)
            .filter(|n| n >> shift == number)
            .map(ByteLen)
            .ok_or_else(error)
    }
}

impl ByteLen {
    /// The size in the largest unit that keeps it short, such as `64KiB`, `1.5GiB`.
    pub fn iec(self) -> String {
        let Some((name, shift)) = UNITS.iter().rev().find(|(_, shift)| self.0 >> shift > 0) else {
            return format!("{}B", self.0);
        };
        let whole = self.0 >> shift;
        let tenths = ((self.0 & ((1 << shift) - 1)) * 10) >> shift;
        let mut out = whole.to_string();
        if tenths > 0 && whole < 100 {
            let _ = write!(out, ".{tenths}");
        }
        out + name + "iB"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes, printed) in [
            ("0", 0, "0B"),
            ("4096", 4096, "4KiB"),
            ("64K", 65536, "64KiB"),
            ("64 KiB", 65536, "64KiB"),
            ("1536MiB", 1536 << 20, "1.5GiB"),
            ("16TiB", 16 << 40, "16TiB"),
        ] {
            assert_eq!(text.parse::<ByteLen>().unwrap(), ByteLen(bytes));
            assert_eq!(ByteLen(bytes).iec(), printed);
        }
        for bad in [
            "",
            "x",
            "-1",
            "64kb",
            "64KB",
            "1.5G",
            "99999999999999999999",
            "99999999999T",
            "64Ki",
        ] {
            assert!(
                bad.parse::<ByteLen>().unwrap_err().to_string().contains("64KiB"),
                "{bad}"
            );
        }
    }
}
