//! Moments as they are typed: a log position, an RFC 3339 time, or a time ago.

use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use hearth_protocol::{Seq, WallMs};

/// A moment in the life of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A log position.
    Seq(Seq),
    /// A wall-clock time.
    Time(WallMs),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ms = |at: SystemTime| {
            let since = at.duration_since(UNIX_EPOCH).ok()?;
            u64::try_from(since.as_millis()).ok().map(|ms| Moment::Time(WallMs(ms)))
        };
        let error = || {
            format!(
                "{text:?} is no moment: use an RFC 3339 time such as 2026-11-20T19:30:00Z, a time ago such as -5m, or a \
                 log position such as 4711"
            )
        };
        if let Ok(seq) = text.strip_prefix('#').unwrap_or(text).parse::<u64>() {
            return Ok(Moment::Seq(Seq(seq)));
        }
        if let Some(ago) = text.strip_prefix('-') {
            let ago = humantime::parse_duration(ago).map_err(|_| error())?;
            return SystemTime::now().checked_sub(ago).and_then(ms).ok_or_else(error);
        }
        humantime::parse_rfc3339_weak(text).ok().and_then(ms).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read() {
        let check = |text: &str, expect: Moment| assert_eq!(text.parse::<Moment>().unwrap(), expect);
        check("4711", Moment::Seq(Seq(4711)));
        check("#4711", Moment::Seq(Seq(4711)));
        check("1970-01-01T00:00:10Z", Moment::Time(WallMs(10_000)));
        check("1970-01-01 00:00:10", Moment::Time(WallMs(10_000)));
        assert!(matches!("-5m".parse().unwrap(), Moment::Time(_)));
        for bad in ["", "now-ish", "-", "-5 parsecs", "1969-01-01T00:00:00Z"] {
            assert!(bad.parse::<Moment>().unwrap_err().contains("RFC 3339"), "{bad}");
        }
    }
}
