//! Ids and names. Ids are random and never reused; names are for people and are checked at the door.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not an id or a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// An id that is not 32 hexadecimal digits.
    #[error("{what} {text:?} is not 32 lower-case hexadecimal digits")]
    Hex {
        /// Which id was parsed.
        what: &'static str,
        /// The text, cut to 80 characters.
        text: String,
    },
    /// A name outside the allowed alphabet or length.
    #[error("{what} {text:?} is not valid: {rule}")]
    Name {
        /// Which name was parsed.
        what: &'static str,
        /// The text, cut to 80 characters.
        text: String,
        /// The rule it breaks, with an example.
        rule: &'static str,
    },
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, ":{:032x}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let ok = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                ok.then(|| u128::from_str_radix(text, 16).ok())
                    .flatten()
                    .map(Self)
                    .ok_or_else(|| NameError::Hex { what: $what, text: cut(text) })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() {
                    s.collect_str(self)
                } else {
                    s.serialize_bytes(&self.0.to_be_bytes())
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(de::Error::custom)
                } else {
                    let bytes = serde_bytes::ByteArray::<16>::deserialize(d)?;
                    Ok(Self(u128::from_be_bytes(bytes.into_array())))
                }
            }
        }
    };
}

id128!(
    /// One virtual disk, for ever; names may change, this does not.
    ImageId,
    "image"
);
id128!(
    /// One layer of an image's stack.
    LayerId,
    "layer"
);
id128!(
    /// One grant of the right to write an image; drawn anew for each attach.
    LeaseId,
    "lease"
);
id128!(
    /// One process start of a publisher, or one life of a store (`storage incarnation`).
    Incarnation,
    "incarnation"
);
id128!(
    /// One order to one node. A repeated id gets the same answer and no second execution.
    CommandId,
    "command"
);

macro_rules! slug {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $dots:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The text, already checked.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if is_slug(text, $max, $dots) {
                    Ok(Self(text.into()))
                } else {
                    Err(NameError::Name { what: $what, text: cut(text), rule: $rule })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, ":{}"), self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

/// Lower-case letters, digits and inner `-`, `_` (and `.` where allowed), starting with a letter or digit.
fn is_slug(text: &str, max: usize, dots: bool) -> bool {
    !text.is_empty()
        && text.len() <= max
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') || (dots && b == b'.'))
        && !text.contains("..")
}

slug!(
    /// A node's id: chosen once at set-up, one NATS subject token, never reused for another machine.
    NodeId,
    "node id",
    63,
    false,
    "use 1 to 63 of a-z 0-9 - _, starting with a letter or digit, such as node-1"
);
slug!(
    /// A scheduler's id: one NATS subject token.
    SchedulerId,
    "scheduler id",
    63,
    false,
    "use 1 to 63 of a-z 0-9 - _, starting with a letter or digit, such as sched-1"
);
slug!(
    /// A snapshot's name, the part after `@`.
    SnapshotName,
    "snapshot name",
    63,
    true,
    "use 1 to 63 of a-z 0-9 - _ ., starting with a letter or digit, such as v1"
);

/// An image's name for people: `project/name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(Box<str>);

impl ImageName {
    /// The whole name, `project/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the slash.
    pub fn project(&self) -> &str {
        self.0.split_once('/').map_or("", |(p, _)| p)
    }

    /// The part after the slash.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, n)| n)
    }
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once('/') {
            Some((p, n)) if is_slug(p, 63, true) && is_slug(n, 63, true) => Ok(Self(text.into())),
            _ => Err(NameError::Name {
                what: "image name",
                text: cut(text),
                rule: "use project/name, each 1 to 63 of a-z 0-9 - _ ., starting with a letter or digit, such as appl/vm-1",
            }),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ImageName {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ImageName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// Who published an event; the last token of aggregate subjects, `node-<id>` or `scheduler-<id>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Publisher {
    /// A node daemon.
    Node(NodeId),
    /// A scheduler.
    Scheduler(SchedulerId),
}

impl Publisher {
    /// The publisher as one subject token.
    pub fn token(&self) -> String {
        match self {
            Publisher::Node(id) => format!("node-{id}"),
            Publisher::Scheduler(id) => format!("scheduler-{id}"),
        }
    }
}

impl fmt::Display for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.token())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_what_they_print() {
        let id = ImageId(0x00ab_cdef);
        assert_eq!(id.to_string().parse::<ImageId>().unwrap(), id);
        assert!("ABCD".parse::<ImageId>().is_err());
        assert!("+0000000000000000000000000000abc".parse::<ImageId>().is_err());
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, "\"00000000000000000000000000abcdef\"");
        assert_eq!(serde_json::from_str::<ImageId>(&json).unwrap(), id);
        let packed = rmp_serde::to_vec_named(&id).unwrap();
        assert_eq!(rmp_serde::from_slice::<ImageId>(&packed).unwrap(), id);
    }

    #[test]
    fn names_are_checked_at_the_door() {
        for good in ["a/b", "appl/vm-1", "masters/os_12.1"] {
            assert_eq!(good.parse::<ImageName>().unwrap().as_str(), good);
        }
        let long = format!("p/{}", "x".repeat(5000));
        for bad in [
            "", "/", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/x..y", "a/b\n", "A/b", "a/ b", "a/b@c", &long,
        ] {
            let err = bad.parse::<ImageName>().unwrap_err().to_string();
            assert!(err.contains("project/name") && err.len() < 400, "{err}");
        }
    }
}
