//! The rules that a test program's machines keep.

use hearth_replication::mutants::Rules;

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
