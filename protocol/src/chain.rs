//! The hash chain over the log.
//!
//! `chain_n = blake3(chain_{n-1} ‖ seq ‖ blake3(envelope) ‖ blake3(payload))`. A payload can be replaced by its hash
//! and the chain still verifies.

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
