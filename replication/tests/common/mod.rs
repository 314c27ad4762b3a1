//! The rules that a test program's machines keep, and short names of what they are about.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use hearth_protocol::{BlockIndex, NodeId};
use hearth_replication::mutants::Rules;
use hearth_replication::request::{Extent, Nodes};

pub fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

pub fn nodes(names: &str) -> Nodes {
    names.split_whitespace().map(node).collect()
}

pub fn extent(first: u64, last: u64) -> Extent {
    Extent {
        first: BlockIndex(first),
        last: BlockIndex(last),
    }
}

/// All rules, or all but the one that `HEARTH_MUTANT` names.
#[cfg(feature = "mutants")]
#[allow(clippy::disallowed_methods, reason = "the environment names the switch")]
pub fn rules() -> Rules {
    use hearth_replication::mutants::Mutant;
    let Ok(name) = std::env::var("HEARTH_MUTANT") else {
        return Rules::default();
    };
    let known = Mutant::ALL.iter().find(|(known, _)| *known == name);
    Rules::breaking(known.expect("HEARTH_MUTANT names a switch of this crate").1)
}

/// All rules.
#[cfg(not(feature = "mutants"))]
pub fn rules() -> Rules {
    Rules::default()
}
