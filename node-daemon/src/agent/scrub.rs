//! Looks after the copies of an image while its guest goes on: compares them, and writes anew what differs or what is named.
//!
//! Which copy is right: what the guest reads. That is this node's own copy, in RAM where a block is there and else on its
//! disk; only where this node holds none, or its disk cannot read the block, another member's. Copies know of no earlier
//! time at which they were right, so two that agree do not outvote the one that the guest has been reading.
//!
//! Invariant: what is counted as repaired was compared again and is equal and durable on every copy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_protocol::event::{CheckHow, CopiesChecked};
use hearth_protocol::limits::DIFFERENCES_NAMED_MAX;
use hearth_protocol::record::{Extent, Nodes};
use hearth_protocol::rpc::{Answer, Failure, FailureKind, JobKind, NodeReply};
use hearth_protocol::{BlockIndex, ByteLen, Event, ImageName, NodeId};
use hearth_replication::owner::{Ask, Check, Denial};
use hearth_replication::request::{BlockHash, Hashes};

use super::jobs::Working;
use super::node::failed;
use super::requests::Requests;
use crate::replica::Replica;

/// Bytes of one comparison or copy; a guest's write to these blocks waits for it.
const PIECE_BYTES: u64 = 1 << 20;

/// How often a job that waits for its rate looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// What is asked for.
struct Wanted {
    how: CheckHow,
    blocks: Extent,
    /// Whose copies are written anew; `None` for all.
    only: Option<NodeId>,
    rate: ByteLen,
}

/// Keeps to so many bytes a second. What was not used is not saved up.
struct Pace {
    rate: u64,
    next: Instant,
}

impl Pace {
    fn took(&mut self, bytes: u64) {
        let due = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        self.next = self.next.max(Instant::now()) + due;
    }

    /// `false` if the job is to end.
    fn wait(&self, working: &Working, done: u64, total: u64) -> bool {
        loop {
            if !working.goes_on(done, total) {
                return false;
            }
            match self.next.checked_duration_since(Instant::now()) {
                Some(left) => std::thread::sleep(left.min(LOOK)),
                None => return true,
            }
        }
    }
}

impl Requests {
    /// Compares copies, as a job.
    pub(super) async fn scrub(
        self,
        image: ImageName,
        blocks: Option<(BlockIndex, BlockIndex)>,
        repair: bool,
        rate: ByteLen,
    ) -> Answer<NodeReply> {
        let how = if repair { CheckHow::Repair } else { CheckHow::Compare };
        self.look_after(image, how, blocks, None, rate)
    }

    /// Writes copies anew, as a job.
    pub(super) async fn sync(
        self,
        image: ImageName,
        blocks: Option<(BlockIndex, BlockIndex)>,
        node: Option<NodeId>,
        rate: ByteLen,
    ) -> Answer<NodeReply> {
        self.look_after(image, CheckHow::Rewrite, blocks, node, rate)
    }

    fn look_after(
        self,
        image: ImageName,
        how: CheckHow,
        blocks: Option<(BlockIndex, BlockIndex)>,
        only: Option<NodeId>,
        rate: ByteLen,
    ) -> Answer<NodeReply> {
        let replica = self.owned(&image)?;
        let end = replica.shape().end();
        let (first, last) = blocks.unwrap_or((BlockIndex(0), end));
        let usage =
            |message: String| Failure::new(FailureKind::Usage, message, format!("hearth location list {image}"));
        if first > last || last > end {
            return Err(usage(format!("{image} has blocks 0 to {end}, not {first} to {last}")));
        }
        if rate.0 == 0 {
            return Err(usage("a rate of 0 bytes a second comes to no end".into()));
        }
        let members = replica.look(|session| session.record().map(|record| record.members_of(Extent { first, last })));
        let members = members.unwrap_or_default();
        if let Some(node) = &only
            && !members.contains(node)
        {
            return Err(usage(format!("{node} is no member of these blocks of {image}")));
        }
        let source = match members.contains(replica.me()) {
            true => Some(replica.me().clone()),
            false => members.first().cloned(),
        };
        if only.is_some() && only == source {
            let node = source.map_or_else(String::new, |node| node.to_string());
            return Err(usage(format!("{node} has the copy that the others are written from")));
        }
        let (kind, what) = match how {
            CheckHow::Compare => (JobKind::Scrub, format!("compare the copies of {image}")),
            CheckHow::Repair => (JobKind::Scrub, format!("compare the copies of {image} and repair them")),
            CheckHow::Rewrite => (JobKind::Sync, format!("write the copies of {image} anew")),
        };
        let wanted = Wanted {
            how,
            blocks: Extent { first, last },
            only,
            rate,
        };
        let runtime = tokio::runtime::Handle::current();
        let jobs = Arc::clone(&self.jobs);
        let job = jobs.start_working(kind, image, what, move |working| {
            let mut checked = CopiesChecked {
                image: replica.image(),
                how,
                first,
                blocks: 0,
                differing: 0,
                repaired: 0,
                copies: BTreeMap::new(),
                named: Vec::new(),
            };
            let done = walk(&replica, &wanted, &mut checked, working);
            if checked.blocks == 0 {
                return done;
            }
            let told = runtime.block_on(
                self.link
                    .publish_image(replica.image(), &Event::CopiesChecked(checked.clone())),
            );
            done?;
            told.map_err(|failure| {
                Failure::new(
                    failure.kind,
                    format!("it is done, but the log does not say so: {failure}"),
                    failure.hint,
                )
            })?;
            outcome(&replica, &checked)
        });
        Ok(NodeReply::Job(job))
    }
}

/// Whether what was found needs somebody.
fn outcome(replica: &Replica, checked: &CopiesChecked) -> Result<(), Failure> {
    let left = checked.differing.saturating_sub(checked.repaired);
    if checked.how == CheckHow::Rewrite || left == 0 {
        return Ok(());
    }
    let name = &replica.shape().name;
    let copies: Vec<_> = checked
        .copies
        .iter()
        .map(|(node, count)| format!("{count} on {node}"))
        .collect();
    let (message, hint) = match checked.how {
        CheckHow::Compare => (
            format!(
                "{left} blocks of {name} differ between its copies: {}",
                copies.join(", ")
            ),
            format!("look at those nodes' disks, then: hearth image scrub {name}"),
        ),
        _ => (
            format!("{left} blocks of {name} cannot be made equal: {}", copies.join(", ")),
            format!("the disk there is failing: hearth location remove {name} NODE, and add another node"),
        ),
    };
    Err(Failure::new(FailureKind::Failed, message, hint))
}

/// All the blocks, piece by piece, each within one run.
fn walk(replica: &Replica, wanted: &Wanted, checked: &mut CopiesChecked, working: &Working) -> Result<(), Failure> {
    let block_size = replica.shape().block_size;
    let total = (wanted.blocks.last.0 - wanted.blocks.first.0 + 1).saturating_mul(block_size);
    let mut pace = Pace {
        rate: wanted.rate.0,
        next: Instant::now(),
    };
    let mut at = wanted.blocks.first;
    let mut wrote = false;
    let ended = loop {
        let done = (at.0 - wanted.blocks.first.0).saturating_mul(block_size);
        if !pace.wait(working, done, total) {
            break Err(failed("it was cancelled".into()));
        }
        if at > wanted.blocks.last {
            break Ok(());
        }
        let Some((piece, members)) = piece(replica, at, wanted.blocks.last) else {
            break Err(failed("the image is served here no more".into()));
        };
        let blocks = piece.last.0 - piece.first.0 + 1;
        pace.took(blocks.saturating_mul(block_size));
        let stepped = match wanted.how {
            CheckHow::Rewrite => rewrite_piece(replica, wanted, piece, &members, checked, &mut wrote),
            _ => compare_piece(replica, wanted, piece, checked, &mut wrote),
        };
        if let Err(denial) = stepped {
            break Err(denied(replica, &denial));
        }
        checked.blocks += blocks;
        working.found(checked);
        at = piece.last.next();
    };
    if wrote && let Err(denial) = replica.ask(Ask::Flush, None) {
        checked.repaired = 0;
        return Err(denied(replica, &denial));
    }
    ended
}

fn denied(replica: &Replica, denial: &Denial) -> Failure {
    Failure::new(
        FailureKind::Refused,
        format!(
            "the copies of {} cannot be looked after: {denial}",
            replica.shape().name
        ),
        format!("hearth location list {}", replica.shape().name),
    )
}

/// The next blocks of one run, and who holds them.
fn piece(replica: &Replica, first: BlockIndex, last: BlockIndex) -> Option<(Extent, Nodes)> {
    let blocks = (PIECE_BYTES / replica.shape().block_size).max(1);
    let last = last.min(BlockIndex(first.0.saturating_add(blocks - 1)));
    replica.look(|session| {
        let record = session.owner()?.record();
        let mut touched = record.touched(Extent { first, last });
        let members = touched.next()?.members.clone();
        let last = touched.next().map_or(last, |next| BlockIndex(next.first.0 - 1));
        Some((Extent { first, last }, members))
    })
}

/// Writes a piece anew from the copy that the guest reads.
fn rewrite_piece(
    replica: &Replica,
    wanted: &Wanted,
    extent: Extent,
    members: &Nodes,
    checked: &mut CopiesChecked,
    wrote: &mut bool,
) -> Result<(), Denial> {
    let me = members.get(replica.me());
    let Some(from) = me.or_else(|| members.first()).cloned() else {
        return Ok(());
    };
    let mut to = members.clone();
    to.remove(&from);
    to.retain(|node| wanted.only.as_ref().is_none_or(|only| only == node));
    let blocks = extent.last.0 - extent.first.0 + 1;
    for node in &to {
        *checked.copies.entry(node.clone()).or_default() += blocks;
    }
    if to.is_empty() {
        return Ok(());
    }
    *wrote = true;
    replica.check(Check::Rewrite { extent, from, to })?;
    checked.repaired += blocks;
    Ok(())
}

/// Compares a piece, and writes anew what differs in it if that is wanted.
fn compare_piece(
    replica: &Replica,
    wanted: &Wanted,
    extent: Extent,
    checked: &mut CopiesChecked,
    wrote: &mut bool,
) -> Result<(), Denial> {
    let told = replica.check(Check::Compare(extent))?;
    for (at, block) in extent.blocks().enumerate() {
        let in_ram = |block| replica.hash_in_ram(block);
        let Some(found) = differs(replica.me(), &told, at, || in_ram(block)) else {
            continue;
        };
        checked.differing += 1;
        for node in found.nodes {
            *checked.copies.entry(node).or_default() += 1;
        }
        if checked.named.len() < DIFFERENCES_NAMED_MAX {
            checked.named.push(block);
        }
        tracing::warn!(image = %replica.shape().name, %block, "copies of a block differ");
        let (CheckHow::Repair, Some(from)) = (wanted.how, found.from) else {
            continue;
        };
        // All of them: this node's own disk may be the one that differs from what is in its RAM.
        let to: Nodes = told.keys().cloned().collect();
        let extent = Extent::block(block);
        *wrote = true;
        match replica.check(Check::Rewrite { extent, from, to }) {
            Ok(_) => {}
            // The set changed: what differs now is for the next look.
            Err(Denial::CopyGone) => continue,
            Err(denial) => return Err(denial),
        }
        let told = replica.check(Check::Compare(extent))?;
        if differs(replica.me(), &told, 0, || None).is_none() {
            checked.repaired += 1;
        }
    }
    Ok(())
}

/// A block that is not the same everywhere.
#[derive(Debug, PartialEq, Eq)]
struct Differs {
    /// The copy that counts; `None` if nobody can read the block.
    from: Option<NodeId>,
    /// Who has something else, or cannot read it.
    nodes: Nodes,
}

/// Whether members told different things of a block. A look into RAM may come after a later write, so it counts only if it
/// is what one of them has on its disk.
fn differs(
    me: &NodeId,
    told: &BTreeMap<NodeId, Hashes>,
    at: usize,
    in_ram: impl FnOnce() -> Option<BlockHash>,
) -> Option<Differs> {
    let hashes: BTreeMap<&NodeId, Option<BlockHash>> = told
        .iter()
        .map(|(node, hashes)| (node, hashes.get(at).copied().flatten()))
        .collect();
    let first = *hashes.values().next()?;
    if first.is_some() && hashes.values().all(|hash| *hash == first) {
        return None;
    }
    let in_ram = in_ram().filter(|hash| hashes.contains_key(me) && hashes.values().any(|other| *other == Some(*hash)));
    let mine = hashes
        .get_key_value(me)
        .and_then(|(node, hash)| Some((*node, (*hash)?)));
    let other = || hashes.iter().find_map(|(node, hash)| Some((*node, (*hash)?)));
    let right = in_ram.map(|hash| (me, hash)).or(mine).or_else(other);
    let nodes = hashes
        .iter()
        .filter(|(_, hash)| right.is_none_or(|(_, right)| **hash != Some(right)));
    Some(Differs {
        from: right.map(|(node, _)| node.clone()),
        nodes: nodes.map(|(node, _)| (*node).clone()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What members told of one block, as `a=1 b=2`, a `-` for what cannot be read; the owner is a.
    fn check(told: &str, in_ram: Option<u128>, expect: Option<(Option<&str>, &str)>) {
        let node = |name: &str| -> NodeId { name.parse().unwrap() };
        let told = told.split(' ').map(|word| {
            let (name, hash) = word.split_once('=').unwrap();
            (node(name), vec![hash.parse().ok().map(BlockHash)])
        });
        let expect = expect.map(|(from, nodes)| Differs {
            from: from.map(node),
            nodes: nodes.split_whitespace().map(node).collect(),
        });
        let told: BTreeMap<_, _> = told.collect();
        assert_eq!(
            differs(&node("a"), &told, 0, || in_ram.map(BlockHash)),
            expect,
            "{told:?}"
        );
    }

    #[test]
    fn the_copy_that_the_guest_reads_counts() {
        check("a=1 b=1 c=1", None, None);
        check("a=1 b=1", Some(7), None);
        check("a=1 b=2 c=1", None, Some((Some("a"), "b")));
        // Two that agree do not outvote it.
        check("a=1 b=2 c=2", None, Some((Some("a"), "b c")));
        // Its disk is not what the guest reads while the block is in RAM.
        check("a=1 b=2 c=2", Some(2), Some((Some("a"), "a")));
        // A write came after the comparison.
        check("a=1 b=2", Some(3), Some((Some("a"), "b")));
        check("a=- b=2 c=2", None, Some((Some("b"), "a")));
        check("a=- b=- c=2", None, Some((Some("c"), "a b")));
        check("a=- b=-", None, Some((None, "a b")));
        // An owner without a copy reads from the first member that can.
        check("b=2 c=3", None, Some((Some("b"), "c")));
        check("b=2 c=3", Some(3), Some((Some("b"), "c")));
        check("a=-", None, Some((None, "a")));
        check("a=1", None, None);
    }
}
