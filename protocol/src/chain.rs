//! The hash chain over the log.
//!
//! `chain_n = blake3(chain_{n-1} ‖ seq ‖ blake3(envelope) ‖ blake3(payload))`. A payload can be replaced by its hash
//! and the chain still verifies.

use serde::{Deserialize, Serialize};

use crate::units::Seq;

/// 32 bytes of blake3.
pub type Hash = [u8; 32];

/// The chain value before the first message.
pub const GENESIS: Hash = [0; 32];

/// Hash of one part (envelope or payload).
pub fn part(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// The chain value after the message `seq`.
pub fn link(previous: &Hash, seq: Seq, envelope: &Hash, payload: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(previous)
        .update(&seq.0.to_be_bytes())
        .update(envelope)
        .update(payload);
    *hasher.finalize().as_bytes()
}

/// A hash as 64 hexadecimal digits.
pub fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// Reads [`hex`]'s digits back; `None` for anything else.
pub fn from_hex(text: &str) -> Option<Hash> {
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

/// What somebody saw of the log while the cluster ran, and keeps elsewhere than the log: `hearth log verify --witness`
/// holds a log against it, so that another history or a cut end shows. One JSON document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// A position.
    pub seq: Seq,
    /// The chain value there, as a leader recorded it; hexadecimal.
    pub chain: String,
    /// The message that recorded it: its position, and the blake3 of its frame in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<(Seq, String)>,
    /// The blake3 of the frames in which operators accepted a loss, as far as they were seen, oldest first: none of them
    /// makes a later rollback acceptable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accepted: Vec<String>,
}
