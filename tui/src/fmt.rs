//! Numbers for people: IEC sizes, grouped counts, durations, RFC 3339 times.

use std::time::{Duration, UNIX_EPOCH};

use hearth_protocol::{ByteLen, HeatScore, WallMs};

const IEC: [(&str, u32); 6] = [
    ("EiB", 60),
    ("PiB", 50),
    ("TiB", 40),
    ("GiB", 30),
    ("MiB", 20),
    ("KiB", 10),
];

/// A size with its IEC unit: one decimal below ten, none above, exact sizes without any.
pub fn bytes(len: ByteLen) -> String {
    for (unit, shift) in IEC {
        let one = 1u64 << shift;
        if len.0 >= one {
            let whole = len.0 >> shift;
            let tenths = ((u128::from(len.0 & (one - 1)) * 10) >> shift) as u64;
            return if whole >= 10 || tenths == 0 {
                format!("{whole} {unit}")
            } else {
                format!("{whole}.{tenths} {unit}")
            };
        }
    }
    format!("{} B", len.0)
}

/// A count with commas between thousands.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A count in at most five characters: `942`, `12.4k`, `3.1M`.
pub fn short(value: u64) -> String {
    for (unit, one) in [("G", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)] {
        if value >= one {
            let whole = value / one;
            return if whole >= 100 {
                format!("{whole}{unit}")
            } else {
                format!("{whole}.{}{unit}", value % one * 10 / one)
            };
        }
    }
    value.to_string()
}

/// Parts per thousand as a percentage with one decimal.
pub fn permille(value: u64) -> String {
    format!("{}.{}%", value / 10, value % 10)
}

/// `part` of `whole` in parts per thousand; 0 of 0 is 0.
pub fn share(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        0
    } else {
        (u128::from(part) * 1000 / u128::from(whole)) as u64
    }
}

/// Microseconds in the unit that leaves two or three digits.
pub fn us(value: u64) -> String {
    match value {
        0..=999 => format!("{value} µs"),
        1_000..=9_999 => format!("{}.{} ms", value / 1_000, value % 1_000 / 100),
        10_000..=999_999 => format!("{} ms", value / 1_000),
        _ => format!("{}.{} s", value / 1_000_000, value % 1_000_000 / 100_000),
    }
}

/// A fixed-point score in bursts, rounded to one decimal, to two below one.
pub fn score(score: HeatScore) -> String {
    let (tenths, hundredths) = (score.rounded(10), score.rounded(100));
    if hundredths < 100 {
        return format!("0.{hundredths:02}");
    }
    let bursts = u64::try_from(tenths / 10).unwrap_or(u64::MAX);
    format!("{}.{}", count(bursts), tenths % 10)
}

/// Seconds as `42 s`, `3 min 5 s`, `2 h 10 min`.
pub fn seconds(value: u64) -> String {
    match value {
        0..=59 => format!("{value} s"),
        60..=3_599 if value.is_multiple_of(60) => format!("{} min", value / 60),
        60..=3_599 => format!("{} min {} s", value / 60, value % 60),
        _ if (value % 3_600 / 60) == 0 => format!("{} h", value / 3_600),
        _ => format!("{} h {} min", value / 3_600, value % 3_600 / 60),
    }
}

/// RFC 3339 in UTC, to the millisecond; `-` for a time that was never set.
pub fn time(at: WallMs) -> String {
    if at.0 == 0 {
        return "-".into();
    }
    UNIX_EPOCH
        .checked_add(Duration::from_millis(at.0))
        .filter(|_| at.0 < 253_402_300_800_000)
        .map_or_else(
            || format!("{} ms", at.0),
            |t| humantime::format_rfc3339_millis(t).to_string(),
        )
}

/// Hours, minutes and seconds of the day, UTC.
pub fn clock(at: WallMs) -> String {
    let s = at.0 / 1_000 % 86_400;
    format!("{:02}:{:02}:{:02}", s / 3_600, s / 60 % 60, s % 60)
}

/// Cuts to `width` characters, the last one an ellipsis if anything was lost.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        out.push('…');
    }
    out
}

/// Breaks text into lines of at most `width` characters, at spaces where there are some; continuation lines start
/// with `indent` spaces.
pub fn wrap(text: &str, width: usize, indent: usize) -> Vec<String> {
    let width = width.max(8);
    let indent = indent.min(width / 2);
    let mut lines = Vec::new();
    let mut rest: Vec<char> = text.chars().collect();
    while rest.len() > width {
        let lead = rest.iter().take_while(|c| **c == ' ').count();
        let at = (lead + 1..=width).rev().find(|i| rest[*i] == ' ').unwrap_or(width);
        lines.push(rest[..at].iter().collect::<String>().trim_end().to_owned());
        let tail: Vec<char> = rest[at..].iter().copied().skip_while(|c| *c == ' ').collect();
        rest = std::iter::repeat_n(' ', indent).chain(tail).collect();
    }
    lines.push(rest.into_iter().collect());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_use_iec_units() {
        for (len, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(bytes(ByteLen(len)), text);
        }
    }

    #[test]
    fn numbers_stay_readable() {
        assert_eq!(count(0), "0");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(short(999), "999");
        assert_eq!(short(12_400), "12.4k");
        assert_eq!(short(123_400_000), "123M");
        assert_eq!(permille(624), "62.4%");
        assert_eq!(us(85), "85 µs");
        assert_eq!(us(1_240), "1.2 ms");
        assert_eq!(us(15_999), "15 ms");
        assert_eq!(us(3_400_000), "3.4 s");
        assert_eq!(score(HeatScore::whole(5)), "5.0");
        assert_eq!(score(HeatScore(1 << 15)), "0.50");
        assert_eq!(score(HeatScore((2 << 16) - 1)), "2.0");
        assert_eq!(score(HeatScore((1 << 16) - 1)), "1.0");
        assert_eq!(seconds(3_600), "1 h");
        assert_eq!(seconds(185), "3 min 5 s");
        assert_eq!(time(WallMs(0)), "-");
        assert_eq!(time(WallMs(1_700_000_000_123)), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(WallMs(u64::MAX)), "18446744073709551615 ms");
        assert_eq!(clock(WallMs(1_700_000_000_123)), "22:13:20");
    }

    #[test]
    fn wrapping_loses_no_word() {
        let text = "promote 12 blocks of appl/vm-1 to node-1: score 5.2 is over the threshold 2.0";
        for width in [8, 20, 33, 200] {
            let lines = wrap(text, width, 2);
            assert!(lines.iter().all(|l| l.chars().count() <= width), "{lines:?}");
            let words: Vec<_> = lines.iter().flat_map(|l| l.split_whitespace()).collect();
            assert_eq!(words.concat(), text.replace(' ', ""));
        }
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
