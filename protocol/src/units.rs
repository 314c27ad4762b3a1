//! Numbers with their unit in the type.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The bare number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The next one. Panics at `u64::MAX`, which no counter here reaches.
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// A message's place in the one total order: its JetStream stream sequence. The first is 1; 0 means "before all".
    Seq
);
number!(
    /// Fencing number of the right to write an image; only grows.
    Epoch
);
number!(
    /// Version of an image's location map; grows with each change.
    SetVersion
);
number!(
    /// Leadership number of a scheduler; only grows.
    Term
);
number!(
    /// Number of a scheduler tick, counted over the life of the cluster.
    TickNo
);
number!(
    /// A block's place within an image or layer, in units of the image's block size.
    BlockIndex
);
number!(
    /// A length in bytes.
    ByteLen
);
number!(
    /// Wall-clock time in milliseconds since the Unix epoch. Data only: no decision about safety rests on it.
    WallMs
);
number!(
    /// Decayed count of bursts, fixed point with [`HeatScore::FRACTION_BITS`] fractional bits.
    HeatScore
);

impl HeatScore {
    /// Fractional bits of the fixed-point number.
    pub const FRACTION_BITS: u32 = 16;

    /// A whole number of bursts as a score.
    pub const fn whole(bursts: u64) -> Self {
        Self(bursts << Self::FRACTION_BITS)
    }

    /// The score as a rounded count of parts, of which a burst has `per_burst`. People see rounded numbers everywhere:
    /// a score a hair below 2 is no 1.9.
    pub const fn rounded(self, per_burst: u32) -> u128 {
        (self.0 as u128 * per_burst as u128 + (1 << (Self::FRACTION_BITS - 1))) >> Self::FRACTION_BITS
    }

    /// The score in bursts for people, rounded to two decimals: `7.25`.
    pub fn bursts_text(self) -> String {
        let hundredths = self.rounded(100);
        format!("{}.{:02}", hundredths / 100, hundredths % 100)
    }
}

/// Checks that `block_size` is a power of two between 4 KiB and 4 MiB.
pub const fn is_block_size(block_size: u64) -> bool {
    block_size.is_power_of_two() && block_size >= 4096 && block_size <= 4 << 20
}

/// Block size of an image when its creator names none, in bytes (start value of DESIGN §2; POLICY §6 measured it).
pub const DEFAULT_BLOCK_SIZE: u64 = 64 << 10;
