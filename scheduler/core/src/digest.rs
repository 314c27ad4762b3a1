//! Digests of the state and of the decisions, for replicas and auditors to compare.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::chain::Hash;
use hearth_protocol::{Command, Seq};

use crate::blocks::Place;
use crate::state::{Data, State};

/// blake3 of the facts in MessagePack, then of every node's blocks in fixed-width columns.
pub(crate) fn state(data: &Data) -> Hash {
    let mut hasher = blake3::Hasher::new();
    rmp_serde::encode::write(&mut hasher, &data.facts).expect("hashing cannot fail, and every fact encodes");
    let mut buffer = Vec::with_capacity(1 << 16);
    for (node, blocks) in &data.blocks {
        buffer.extend_from_slice(node.as_str().as_bytes());
        buffer.push(0);
        for (layer, blocks) in &blocks.layers {
            buffer.extend_from_slice(&layer.0.to_be_bytes());
            buffer.extend_from_slice(&blocks.block_bytes.to_be_bytes());
            buffer.extend_from_slice(&(blocks.cells.len() as u64).to_be_bytes());
            for (block, cell) in &blocks.cells {
                buffer.extend_from_slice(&block.0.to_be_bytes());
                buffer.extend_from_slice(&cell.weight.to_be_bytes());
                buffer.extend_from_slice(&cell.heat_seq.0.to_be_bytes());
                buffer.push(match cell.place {
                    Place::Out => 0,
                    Place::Arriving => 1,
                    Place::Resident => 2,
                    Place::Leaving => 3,
                    Place::Doubtful => 4,
                    Place::Resting => 5,
                });
                buffer.push(cell.skips);
                if buffer.len() + 32 > buffer.capacity() {
                    hasher.update(&buffer);
                    buffer.clear();
                }
            }
        }
        for (tick, resting) in &blocks.rests {
            buffer.extend_from_slice(&tick.to_be_bytes());
            for (layer, block) in resting {
                buffer.extend_from_slice(&layer.0.to_be_bytes());
                buffer.extend_from_slice(&block.0.to_be_bytes());
            }
        }
        hasher.update(&buffer);
        buffer.clear();
    }
    *hasher.finalize().as_bytes()
}

/// The decisions' chain after one more command.
pub(crate) fn chain_decision(previous: &Hash, command: &Command) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous);
    rmp_serde::encode::write_named(&mut hasher, command).expect("hashing cannot fail, and a command always encodes");
    *hasher.finalize().as_bytes()
}

/// Digests that were due, to compare with what a leader recorded: a standby and an auditor use the same book.
#[derive(Debug, Clone, Default)]
pub struct DigestBook {
    /// Oldest first.
    kept: VecDeque<(Seq, Hash, Hash)>,
}

/// Positions a [`DigestBook`] keeps: a leader records a digest within a few events of the position it covers.
const BOOK_MAX: usize = 64;

/// What a [`DigestBook`] says of a recorded digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestCheck {
    /// Both digests agree.
    Same,
    /// The state differs: this replica and the leader folded the same log into different states.
    StateDiffers {
        /// The digest computed here.
        here: Hash,
    },
    /// The state agrees, the decisions differ.
    DecisionsDiffer {
        /// The digest computed here.
        here: Hash,
    },
    /// The book has no digest at that position.
    Unknown,
}

impl DigestBook {
    /// Computes and keeps the digests after an event for which [`crate::Applied::digest`] is set; returns them, in
    /// the order (state, decisions).
    pub fn note(&mut self, state: &State) -> (Hash, Hash) {
        let digests = (state.digest(), state.decisions_digest());
        if self.kept.len() == BOOK_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back((state.seq(), digests.0, digests.1));
        digests
    }

    /// Compares a recorded digest with the book.
    pub fn check(&self, at: Seq, state: &Hash, decisions: &Hash) -> DigestCheck {
        match self.kept.iter().rev().find(|(seq, ..)| *seq == at) {
            None => DigestCheck::Unknown,
            Some((_, here, _)) if here != state => DigestCheck::StateDiffers { here: *here },
            Some((_, _, here)) if here != decisions => DigestCheck::DecisionsDiffer { here: *here },
            Some(_) => DigestCheck::Same,
        }
    }

    /// All digests kept, oldest first: position, state, decisions.
    pub fn kept(&self) -> BTreeMap<Seq, (Hash, Hash)> {
        self.kept.iter().map(|(seq, s, d)| (*seq, (*s, *d))).collect()
    }
}
