//! The grammar of export names.
//!
//! | name | what it asks for |
//! |---|---|
//! | `project/image` | an image, to use as a disk |
//! | 32 hexadecimal digits | an image by id, or a sealed layer by id: ids are random, so one text is never both |
//! | `<layer>@<epoch>.<lease>.<set-version>` | a member's replica, to write under that lease |
//! | `<layer>@<epoch>?ro` | a member's replica, to read for resync or an incoming migration |

use std::fmt;
use std::str::FromStr;

use hearth_protocol::{Epoch, ImageId, ImageName, LayerId, LeaseId, SetVersion};

/// What a client asks for by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ExportName {
    /// An image by its name.
    Image(ImageName),
    /// An image or a sealed layer by its id.
    Id(u128),
    /// A member's replica, writable by the holder of the lease.
    MemberWrite {
        /// Which layer.
        layer: LayerId,
        /// The owner's epoch.
        epoch: Epoch,
        /// The owner's lease.
        lease: LeaseId,
        /// The location map the owner acts on.
        set_version: SetVersion,
    },
    /// A member's replica, read-only.
    MemberRead {
        /// Which layer.
        layer: LayerId,
        /// The epoch the reader knows.
        epoch: Epoch,
    },
}

impl ExportName {
    /// The name that serves a sealed layer.
    pub fn sealed_layer(layer: LayerId) -> Self {
        ExportName::Id(layer.0)
    }

    /// The name that serves an image by id.
    pub fn image_id(image: ImageId) -> Self {
        ExportName::Id(image.0)
    }
}

/// Why a text is no export name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an export name: use project/image, an image's or layer's id, \
     <layer>@<epoch>.<lease>.<set-version> or <layer>@<epoch>?ro"
)]
pub struct ExportNameError(String);

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExportName::Image(name) => name.fmt(f),
            ExportName::Id(id) => write!(f, "{id:032x}"),
            ExportName::MemberWrite {
                layer,
                epoch,
                lease,
                set_version,
            } => {
                write!(f, "{layer}@{epoch}.{lease}.{set_version}")
            }
            ExportName::MemberRead { layer, epoch } => write!(f, "{layer}@{epoch}?ro"),
        }
    }
}

/// A decimal number in its one spelling: no sign, no leading zero.
fn number(text: &str) -> Option<u64> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    canonical.then(|| text.parse().ok()).flatten()
}

fn parse(text: &str) -> Option<ExportName> {
    if text.contains('/') {
        return text.parse().ok().map(ExportName::Image);
    }
    let Some((layer, rest)) = text.split_once('@') else {
        return text.parse::<LayerId>().ok().map(|id| ExportName::Id(id.0));
    };
    let layer = layer.parse().ok()?;
    if let Some(epoch) = rest.strip_suffix("?ro") {
        return Some(ExportName::MemberRead {
            layer,
            epoch: Epoch(number(epoch)?),
        });
    }
    let mut parts = rest.split('.');
    let name = ExportName::MemberWrite {
        layer,
        epoch: Epoch(number(parts.next()?)?),
        lease: parts.next()?.parse().ok()?,
        set_version: SetVersion(number(parts.next()?)?),
    };
    parts.next().is_none().then_some(name)
}

impl FromStr for ExportName {
    type Err = ExportNameError;

    fn from_str(text: &str) -> Result<Self, ExportNameError> {
        parse(text).ok_or_else(|| ExportNameError(text.chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYER: &str = "000102030405060708090a0b0c0d0e0f";
    const LEASE: &str = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

    #[test]
    fn names_read_back_what_they_print() {
        let good = [
            "appl/vm-1".to_owned(),
            LAYER.to_owned(),
            format!("{LAYER}@7.{LEASE}.12"),
            format!("{LAYER}@0.{LEASE}.0"),
            format!("{LAYER}@18446744073709551615?ro"),
        ];
        for text in good {
            assert_eq!(text.parse::<ExportName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        let bad = [
            String::new(),
            "vm-1".to_owned(),
            "a/b/c".to_owned(),
            LAYER.to_uppercase(),
            format!("{LAYER}@"),
            format!("{LAYER}@7"),
            format!("{LAYER}@?ro"),
            format!("{LAYER}@07?ro"),
            format!("{LAYER}@+7?ro"),
            format!("{LAYER}@7?rw"),
            format!("{LAYER}@18446744073709551616?ro"),
            format!("{LAYER}@7.{LEASE}"),
            format!("{LAYER}@7.{LEASE}.12.13"),
            format!("{LAYER}@7.{LEASE}.12?ro"),
            format!("{LAYER}@7.short.12"),
            "x".repeat(5_000),
        ];
        for text in bad {
            let error = text.parse::<ExportName>().unwrap_err().to_string();
            assert!(error.len() < 400, "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_that_parses_prints_the_same(text in "[0-9a-f@.?ro/+-]{0,80}") {
            if let Ok(name) = text.parse::<ExportName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
