//! Switches that break one rule each, so that it can be shown that exploring the machines notices. Only a build with the
//! feature `mutants` has them: there a machine carries the [`Rules`] it was made with. In other builds [`Rules`] is empty
//! and every question is answered by a constant.

use serde::{Deserialize, Serialize};

/// A rule that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mutant {
    /// A write that a member missed is acknowledged before the smaller set is committed and durable (rule 2).
    AckBeforeSetDurable,
    /// A member takes another lease of the epoch that it has recorded (rule 1).
    EqualEpochAccepted,
    /// A joining node becomes a member without a flush before (rule 7).
    JoinBeforeFlush,
    /// An incoming destination takes a client that connects and writes for the source's end (rule 8).
    HandoverFromConnect,
    /// An owner answers without the members' read leases (rule 3).
    ReadWithoutLease,
    /// The fence answers while admitted writes are still under way.
    LateWriteAfterFence,
    /// A takeover starts from whichever record answered, not from the newest one (§4).
    OlderRecordTaken,
    /// A member takes an epoch that was granted over an older record than its own.
    StaleGrantTaken,
    /// A new owner opens without waiting for the old one's read leases to end (rule 3).
    NoWait,
    /// A member takes requests of an older set version (rule 1).
    StaleSetServed,
    /// A new owner opens without making the regions in doubt equal (rule 4).
    DoubtIgnored,
    /// A read is answered while a write to the same blocks is under way.
    ReadOvertakesWrite,
    /// A block is copied to a joining node without holding back writes to it (rule 7).
    CopyUnlocked,
    /// An owner counts the members of a larger set only once it has seen the change committed.
    JoinCountsLate,
    /// A member's own flush unmarks regions that other members may not have yet.
    UnmarkedAlone,
    /// A node that was granted the last epoch takes that for the old owner's seal.
    OwnEpochSeals,
    /// A hand-over goes on although acknowledged writes may be missing everywhere (rule 4).
    GapTaken,
    /// An owner acknowledges writes and flushes without the members' read leases.
    AckWithoutLease,
    /// A member does not tell the owner on its node that a newer epoch fences it.
    OwnerNotTold,
    /// An answer given under an older record counts although the request was repeated.
    OldAnswerCounts,
    /// What was made equal after a crash is not flushed before the image opens.
    EqualUnflushed,
    /// A member that left and joins again is not copied what was written meanwhile.
    WritesUnmissed,
    /// A member that left and joins again is not copied what it has marked itself.
    MarkedUncopied,
    /// A destination whose takeover gave up hears no further seal and does not go on (rule 8).
    DestinationDeaf,
    /// An owner begins nothing while the log does not answer it (rule 9).
    LogAwaited,
    /// A change that the log does not answer is taken for committed (rule 9).
    SilenceCounts,
    /// A write for which the last copy has no room is acknowledged (rule 10).
    FullAcknowledged,
    /// A member that has no room for a write stays in the set beside one that has it (rule 10).
    FullMemberKept,
}

impl Mutant {
    /// Every switch with its name for `HEARTH_MUTANT`.
    pub const ALL: &[(&str, Mutant)] = &[
        ("ack-before-set-durable", Mutant::AckBeforeSetDurable),
        ("equal-epoch-accepted", Mutant::EqualEpochAccepted),
        ("join-before-flush", Mutant::JoinBeforeFlush),
        ("handover-from-connect", Mutant::HandoverFromConnect),
        ("read-without-lease", Mutant::ReadWithoutLease),
        ("late-write-after-fence", Mutant::LateWriteAfterFence),
        ("older-record-taken", Mutant::OlderRecordTaken),
        ("stale-grant-taken", Mutant::StaleGrantTaken),
        ("no-wait", Mutant::NoWait),
        ("stale-set-served", Mutant::StaleSetServed),
        ("doubt-ignored", Mutant::DoubtIgnored),
        ("read-overtakes-write", Mutant::ReadOvertakesWrite),
        ("copy-unlocked", Mutant::CopyUnlocked),
        ("join-counts-late", Mutant::JoinCountsLate),
        ("unmarked-alone", Mutant::UnmarkedAlone),
        ("own-epoch-seals", Mutant::OwnEpochSeals),
        ("gap-taken", Mutant::GapTaken),
        ("ack-without-lease", Mutant::AckWithoutLease),
        ("owner-not-told", Mutant::OwnerNotTold),
        ("old-answer-counts", Mutant::OldAnswerCounts),
        ("equal-unflushed", Mutant::EqualUnflushed),
        ("writes-unmissed", Mutant::WritesUnmissed),
        ("marked-uncopied", Mutant::MarkedUncopied),
        ("destination-deaf", Mutant::DestinationDeaf),
        ("log-awaited", Mutant::LogAwaited),
        ("silence-counts", Mutant::SilenceCounts),
        ("full-acknowledged", Mutant::FullAcknowledged),
        ("full-member-kept", Mutant::FullMemberKept),
    ];
}

/// The rules a machine keeps: all of them, but for one switch in builds with the feature `mutants`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rules {
    #[cfg(feature = "mutants")]
    broken: Option<Mutant>,
}

impl Rules {
    /// Whether a rule is broken. Constant in production builds.
    #[cfg(not(feature = "mutants"))]
    #[inline(always)]
    pub const fn breaks(self, _mutant: Mutant) -> bool {
        false
    }

    /// Whether a rule is broken.
    #[cfg(feature = "mutants")]
    pub fn breaks(self, mutant: Mutant) -> bool {
        self.broken == Some(mutant)
    }

    /// All rules but one.
    #[cfg(feature = "mutants")]
    pub fn breaking(mutant: Mutant) -> Self {
        Self { broken: Some(mutant) }
    }
}
