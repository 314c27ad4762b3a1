//! Wrong variants of the protocol: each breaks one rule, and exploring it finds a run in which the named invariant breaks.

use std::collections::BTreeSet;

use hearth_replication::mutants::{Mutant, Rules};
use stateright::{Checker, HasDiscoveries, Model};

use super::config::Config;
use super::ghost::{DURABLE, LINEARIZABLE, ON_EVERY_MEMBER, ONE_WRITER};
use super::model::{Exploration, ONE_SIDE};
use super::{configs, print};

/// Explores until the named invariant is broken; one thread, so that the run is a shortest one.
fn finds(mutant: Mutant, config: fn(Rules, bool) -> Config, broken: &'static str) {
    let config = config(Rules::breaking(mutant), false);
    let checker = Exploration(config)
        .checker()
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([broken])))
        .spawn_bfs()
        .join();
    let states = checker.unique_state_count();
    let Some(path) = checker.discovery(broken) else {
        panic!(
            "{mutant:?}: {states} states of {}, and {broken:?} holds in all",
            config.name
        );
    };
    let steps = path.clone().into_actions().len();
    println!(
        "{mutant:?} breaks {broken:?} in {steps} steps ({}, {states} states):",
        config.name
    );
    print(path);
}

/// Switches whose rules are about the log's absence, full disks and that things come to an end, none of which is explored.
const NOT_EXPLORED: &[Mutant] = &[
    Mutant::DestinationDeaf,
    Mutant::LogAwaited,
    Mutant::SilenceCounts,
    Mutant::FullAcknowledged,
    Mutant::FullMemberKept,
];

macro_rules! variants {
    ($($name:ident: $mutant:ident, $config:ident, $broken:ident;)+) => {
        $(#[test]
        fn $name() {
            finds(Mutant::$mutant, configs::$config, $broken);
        })+

        #[test]
        fn every_switch_has_its_variant() {
            let tested = [$(Mutant::$mutant),+];
            for (name, mutant) in Mutant::ALL {
                let explored = tested.contains(mutant) != NOT_EXPLORED.contains(mutant);
                assert!(explored, "nothing explores {name}");
            }
        }
    };
}

variants! {
    acknowledge_before_the_set_is_durable: AckBeforeSetDurable, shrink_takeover, ON_EVERY_MEMBER;
    equal_epoch_with_another_lease: EqualEpochAccepted, tail_rivals, ONE_WRITER;
    join_before_flush: JoinBeforeFlush, join_power, DURABLE;
    handover_from_connect: HandoverFromConnect, handover_alone, LINEARIZABLE;
    read_without_a_lease: ReadWithoutLease, lease_alone, LINEARIZABLE;
    late_write_after_the_fence: LateWriteAfterFence, fence, ON_EVERY_MEMBER;
    takeover_from_an_older_record: OlderRecordTaken, tail_shrink, ON_EVERY_MEMBER;
    grant_over_an_older_record: StaleGrantTaken, tail_shrink, ON_EVERY_MEMBER;
    no_wait: NoWait, lease_alone, LINEARIZABLE;
    stale_set_version: StaleSetServed, shrink_alone, ON_EVERY_MEMBER;
    doubt_ignored: DoubtIgnored, in_flight, ON_EVERY_MEMBER;
    read_overtakes_write: ReadOvertakesWrite, in_flight, LINEARIZABLE;
    copy_without_the_lock: CopyUnlocked, join_alone, ON_EVERY_MEMBER;
    join_counts_late: JoinCountsLate, join_takeover, ONE_SIDE;
    unmarked_alone: UnmarkedAlone, in_flight, ON_EVERY_MEMBER;
    own_epoch_for_a_seal: OwnEpochSeals, lease_again, LINEARIZABLE;
    gap_in_a_handover: GapTaken, handover_power, ON_EVERY_MEMBER;
    acknowledged_without_a_lease: AckWithoutLease, crash, ONE_WRITER;
    owner_not_told: OwnerNotTold, join_takeover, ONE_WRITER;
    old_answer_counts: OldAnswerCounts, shrink_alone, ON_EVERY_MEMBER;
    made_equal_without_a_flush: EqualUnflushed, site_loss, DURABLE;
    writes_unmissed: WritesUnmissed, rejoin_alone, ON_EVERY_MEMBER;
    marked_uncopied: MarkedUncopied, rejoin_power, ON_EVERY_MEMBER;
}
