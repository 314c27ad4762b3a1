//! Sentences: what a decision, an event or a state means, for people.
//!
//! One place, so that the dashboard, `hearth why` and `hearth log` say the same thing in the same words.

use hearth_protocol::aggregate::Change;
use hearth_protocol::command::{Alternative, Outcome};
use hearth_protocol::event::{CheckHow, CopiesChecked};
use hearth_protocol::limits::TICK_MS;
use hearth_protocol::record::Nodes;
use hearth_protocol::view::{DecisionView, DrainView, ImageView, NodeView, ReplicasView};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, Epoch, Event, HeatScore, ImageId, ImageName, LayerId, NodeId, Order, Reason, Seq,
    SetVersion, WallMs,
};

use crate::fmt;

/// The first eight digits of an id: enough to recognise it.
pub fn brief(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// A count and the word for it.
pub fn plural(n: u64, one: &str) -> String {
    format!("{} {one}{}", fmt::count(n), if n == 1 { "" } else { "s" })
}

/// Whose blocks a command moves: its image, or its layer and how many images stand on it.
pub fn whose(layer: LayerId, images: &[ImageName]) -> String {
    match images {
        [] => format!("layer {}", brief(&layer.to_string())),
        [one] => one.to_string(),
        [first, rest @ ..] => format!("{first} (+{} on the same layer)", rest.len()),
    }
}

/// A number of a reason in its unit, which its name tells: scores are fixed point, `_bytes` are sizes, and so on.
pub fn number(name: &str, value: u64) -> String {
    if name.ends_with("_at_ms") {
        return fmt::time(WallMs(value));
    }
    let has = |part: &str| name == part || name.ends_with(&format!("_{part}")) || name.starts_with(&format!("{part}_"));
    if has("score") || has("scores") || name.ends_with("threshold") {
        fmt::score(HeatScore(value))
    } else if name.ends_with("bytes_per_s_max") || name.ends_with("bytes_per_s") {
        format!("{}/s", fmt::bytes(ByteLen(value)))
    } else if name.contains("bytes") {
        fmt::bytes(ByteLen(value))
    } else if has("percent") {
        format!("{value}%")
    } else if has("permille") {
        fmt::permille(value)
    } else if has("centibursts") {
        format!("{}.{:02}", value / 100, value % 100)
    } else if has("us") {
        fmt::us(value)
    } else if has("s") {
        fmt::seconds(value)
    } else {
        fmt::count(value)
    }
}

/// The number a reason gives under a name that holds `part`.
fn find(reason: &Reason, part: &str) -> Option<String> {
    reason
        .numbers
        .iter()
        .find(|(name, _)| name.contains(part))
        .map(|(name, value)| number(name, *value))
}

/// One sentence for a decision.
pub fn sentence(decision: &DecisionView) -> String {
    told(&decision.command, decision.blocks, &decision.images)
}

/// One sentence for a command: what, whose, where, and the numbers that decided.
pub fn command(command: &Command, images: &[ImageName]) -> String {
    told(command, command.order.block_count() as u64, images)
}

fn told(command: &Command, blocks: u64, images: &[ImageName]) -> String {
    let whose = whose(command.order.layer(), images);
    let blocks = plural(blocks, "block");
    match &command.order {
        Order::Promote { blocks: list, from, .. } => {
            let mut text = format!("promote {blocks} of {whose} to {}", command.node);
            if from != &command.node {
                text += &format!(" from {from}");
            }
            let scores = (
                list.iter().map(|p| p.score).max().unwrap_or_default(),
                list.iter().map(|p| p.score).min().unwrap_or_default(),
            );
            text += &format!(": score {}", span(scores.1, scores.0));
            if let Some(threshold) = find(&command.reason, "threshold") {
                text += &format!(" ≥ threshold {threshold}");
            }
            if let Some(best) = list.iter().filter_map(|p| p.displaces).map(|r| r.score).max() {
                text += &format!(", displaces {}", fmt::score(best));
            }
            text
        }
        Order::Demote {
            blocks: list, bytes, ..
        } => {
            let most = list.iter().map(|d| d.score).max().unwrap_or_default();
            let least = list.iter().map(|d| d.score).min().unwrap_or_default();
            let mut text = format!(
                "demote {blocks} of {whose} on {}: score {}",
                command.node,
                span(least, most)
            );
            if let Some(below) = find(&command.reason, "demote_below").or_else(|| find(&command.reason, "below")) {
                text += &format!(" < {below}");
            } else {
                text += &format!(", frees {}", fmt::bytes(*bytes));
            }
            text
        }
        Order::Replicate {
            to,
            replaces: Some(from),
            ..
        } => {
            let mut text = format!("move a replica of {whose} from {from} to {to}");
            let count = |name| count(command, name);
            if let Some(ticks) = count("draining_ticks") {
                text += &format!(": {from} drains for {}", fmt::seconds(ticks * TICK_MS / 1_000));
            }
            if let Some(together) = count("replicas_in_one_domain") {
                text += &format!(": {together} replicas in one fault domain");
            }
            if let (Some(there), Some(here)) = (count("from_bytes"), count("to_bytes")) {
                text += &format!(
                    ": {} lie on {from}, {} on {to}",
                    fmt::bytes(ByteLen(there)),
                    fmt::bytes(ByteLen(here))
                );
            }
            text
        }
        Order::Drop { from, .. } => {
            let mut text = format!("drop the replica of {whose} on {from}");
            if let (Some(members), Some(wanted)) = (count(command, "members"), count(command, "wanted")) {
                text += &format!(": {members} in sync, {wanted} wanted");
            }
            text
        }
        Order::Replicate { to, blocks: part, .. } => {
            let count = |name| count(command, name);
            let mut text = match part {
                None => format!("replicate {whose} to {to}"),
                Some(_) => format!("replicate {blocks} of {whose} to {to}"),
            };
            if let (Some(members), Some(wanted)) = (count("members"), count("wanted")) {
                text += &format!(": {members} of {wanted} replicas left");
            }
            if let Some(at) = count("degraded_at_ms").filter(|at| *at > 0) {
                text += &format!(" since {}", fmt::clock(WallMs(at)));
            }
            if let Some(grace) = count("grace_ticks") {
                text += &format!(", grace time {} over", fmt::seconds(grace * TICK_MS / 1_000));
            }
            text
        }
    }
}

/// A number of a command's reason.
fn count(command: &Command, name: &str) -> Option<u64> {
    let found = command.reason.numbers.iter().find(|(known, _)| known == name);
    found.map(|(_, value)| *value)
}

fn span(low: HeatScore, high: HeatScore) -> String {
    let (low, high) = (fmt::score(low), fmt::score(high));
    if low == high { high } else { format!("{low}–{high}") }
}

/// How a command ended, in a few words.
pub fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done { done, skipped, .. } => counted(outcome, (done.len() as u64, skipped.len() as u64)),
        Outcome::Refused { .. } => counted(outcome, (0, 0)),
    }
}

fn counted(outcome: &Outcome, (done, skipped): (u64, u64)) -> String {
    match outcome {
        Outcome::Done { took_us, .. } => {
            let mut text = format!("{} done in {}", fmt::count(done), fmt::us(*took_us));
            if skipped > 0 {
                text += &format!(", {} skipped", fmt::count(skipped));
            }
            text
        }
        Outcome::Refused { why } => format!("refused: {why}"),
    }
}

/// What became of a decision, in a few words.
pub fn ended(decision: &DecisionView) -> String {
    match &decision.ended {
        Some((_, Outcome::Done { .. })) if matches!(decision.command.order, Order::Replicate { .. }) => "begun".into(),
        Some((_, Outcome::Done { .. })) if matches!(decision.command.order, Order::Drop { .. }) => "done".into(),
        Some((_, result)) => counted(result, decision.done_skipped),
        None if decision.expired => "expired without an answer".into(),
        None => "running".into(),
    }
}

/// Log positions as text, the middle left out when there are many.
pub fn seqs(list: &[Seq]) -> String {
    let show = |part: &[Seq]| part.iter().map(|s| format!("#{s}")).collect::<Vec<_>>().join(" ");
    if list.len() <= 12 {
        show(list)
    } else {
        format!(
            "{} … {} ({} in all)",
            show(&list[..6]),
            show(&list[list.len() - 3..]),
            list.len()
        )
    }
}

/// A block that lost, and why, in words.
pub fn alternative(lost: &Alternative, image: Option<&ImageName>) -> String {
    let of = image.map_or_else(
        || format!("layer {}", brief(&lost.layer.to_string())),
        ToString::to_string,
    );
    format!(
        "block {} of {of}, score {}: {}",
        lost.block,
        fmt::score(lost.score),
        lost.why.replace('_', " ")
    )
}

/// A reason in lines: rule, numbers, what it rests on, what lost.
pub fn reason(reason: &Reason) -> Vec<String> {
    let mut lines = vec![format!(
        "rule      {} (policy version {})",
        reason.rule, reason.policy_version
    )];
    for (i, (name, value)) in reason.numbers.iter().enumerate() {
        let head = if i == 0 { "numbers" } else { "" };
        lines.push(format!(
            "{head:<9} {} = {}",
            name.replace('_', " "),
            number(name, *value)
        ));
    }
    if !reason.rests_on.is_empty() {
        lines.push(format!("rests on  {}", seqs(&reason.rests_on)));
    }
    for (i, lost) in reason.lost.iter().enumerate() {
        let head = if i == 0 { "lost" } else { "" };
        lines.push(format!("{head:<9} {}", alternative(lost, None)));
    }
    for (i, lost) in reason.lost_nodes.iter().enumerate() {
        let head = if i == 0 && reason.lost.is_empty() { "lost" } else { "" };
        lines.push(format!("{head:<9} node {}: {}", lost.node, lost.why.replace('_', " ")));
    }
    lines
}

/// Blocks as runs, `3-5 9 12-40`.
pub fn blocks(list: impl IntoIterator<Item = BlockIndex>) -> String {
    let mut all: Vec<u64> = list.into_iter().map(|b| b.0).collect();
    all.sort_unstable();
    all.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for b in all {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == b => *last = b,
            _ => runs.push((b, b)),
        }
    }
    let text: Vec<_> = runs
        .iter()
        .map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") })
        .collect();
    text.join(" ")
}

/// Everything about a decision, in lines.
pub fn decision(decision: &DecisionView) -> Vec<String> {
    let c = &decision.command;
    let mut lines = vec![
        sentence(decision),
        String::new(),
        format!("command   {}", c.id),
        format!(
            "given     #{} at {}, tick {}, term {}, expires at tick {}",
            decision.seq,
            fmt::time(decision.time),
            c.tick,
            c.term,
            c.expires
        ),
    ];
    let mut fence = |epoch: &Epoch, set_version: &SetVersion, bytes: &ByteLen| {
        lines.push(format!(
            "fence     epoch {epoch}, set version {set_version}, at most {}",
            fmt::bytes(*bytes)
        ));
    };
    let list: Vec<BlockIndex> = match &c.order {
        Order::Promote {
            blocks,
            epoch,
            set_version,
            bytes,
            ..
        } => {
            fence(epoch, set_version, bytes);
            blocks.iter().map(|p| p.block).collect()
        }
        Order::Demote { blocks, .. } => blocks.iter().map(|d| d.block).collect(),
        Order::Replicate {
            epoch,
            set_version,
            bytes,
            ..
        } => {
            fence(epoch, set_version, bytes);
            Vec::new()
        }
        Order::Drop { epoch, set_version, .. } => {
            fence(epoch, set_version, &ByteLen(0));
            Vec::new()
        }
    };
    lines.push(format!("layer     {}", c.order.layer()));
    if !decision.images.is_empty() {
        let names: Vec<_> = decision.images.iter().map(|n| n.as_str()).collect();
        lines.push(format!("images    {}", names.join(" ")));
    }
    let named = list.len() as u64;
    let more = match decision.blocks.saturating_sub(named) {
        0 => String::new(),
        more => format!(" and {} more", fmt::count(more)),
    };
    lines.push(match &c.order {
        Order::Replicate { blocks: None, .. } | Order::Drop { .. } => "blocks    all".into(),
        Order::Replicate {
            blocks: Some(extent), ..
        } => format!("blocks    {}-{}", extent.first, extent.last),
        Order::Promote { .. } | Order::Demote { .. } => format!("blocks    {}{more}", blocks(list)),
    });
    lines.push(String::new());
    lines.extend(reason(&c.reason));
    lines.push(String::new());
    match &decision.ended {
        Some((seq, result)) => {
            lines.push(format!("result    #{seq} {}", ended(decision)));
            if let Outcome::Done { skipped, bytes, .. } = result {
                lines.push(format!("moved     {}", fmt::bytes(*bytes)));
                for (block, why) in skipped.iter().take(8) {
                    lines.push(format!("skipped   block {block}: {}", why.replace('_', " ")));
                }
            }
        }
        None => lines.push(format!("result    {}", ended(decision))),
    }
    lines
}

/// What is left on a node that drains, in words.
pub fn drain(view: &DrainView) -> String {
    if view.is_done() {
        return format!("since tick {}: nothing is left there", view.since);
    }
    let mut parts = Vec::new();
    if view.replicas > 0 {
        parts.push(format!("{} to move", plural(view.replicas, "replica")));
    }
    if view.owned > 0 {
        parts.push(format!(
            "{} to migrate or attach elsewhere",
            plural(view.owned, "image")
        ));
    }
    if view.alone > 0 {
        parts.push(format!("{} without a copy elsewhere", plural(view.alone, "image")));
    }
    format!("since tick {}: {}", view.since, parts.join(", "))
}

/// Everything about a node, in lines.
pub fn node(n: &NodeView) -> Vec<String> {
    let t = &n.tier;
    vec![
        format!("node           {}", n.id),
        format!(
            "state          {}",
            if n.present {
                "present"
            } else {
                "ABSENT: no report lately"
            }
        ),
        format!("drains         {}", n.drain.as_ref().map_or("no".into(), drain)),
        format!("last report    tick {}", n.last_report),
        format!("fault domain   {}", n.fault_domain),
        format!("images         {}", n.images),
        format!("lie there      {}", fmt::bytes(n.held)),
        String::new(),
        format!("RAM tier       {}", fmt::bytes(t.capacity)),
        format!(
            "  main         {} of {} (what the scheduler promoted)",
            fmt::bytes(t.main),
            fmt::bytes(t.main_capacity)
        ),
        format!(
            "  front        {} of {} (what the node let in on a miss)",
            fmt::bytes(t.front),
            fmt::bytes(t.front_capacity)
        ),
        format!("  ordered      {} in flight", fmt::bytes(n.in_flight)),
        String::new(),
        format!("heat source    {}", n.heat_source),
        format!("  records      {}", fmt::count(n.probe_events_total)),
        format!("  lost         {}", fmt::count(n.probe_lost_total)),
        format!("disk reads     {}", latency(&n.disk_read)),
    ]
}

/// A latency summary in words.
pub fn latency(l: &hearth_protocol::heat::LatencySummary) -> String {
    if l.count == 0 {
        "none in the last window".into()
    } else {
        format!(
            "p50 {}, p99 {}, max {} ({} requests)",
            fmt::us(l.p50_us),
            fmt::us(l.p99_us),
            fmt::us(l.max_us),
            fmt::count(l.count)
        )
    }
}

/// Everything about an image, in lines.
pub fn image(i: &ImageView) -> Vec<String> {
    let blocks = i.size.0.div_ceil(i.block_size.0.max(1));
    let snapshots: Vec<_> = i.snapshots.iter().map(|s| s.as_str()).collect();
    vec![
        format!("image          {}", i.name),
        format!("id             {}", i.id),
        format!(
            "size           {} in {} blocks of {}",
            fmt::bytes(i.size),
            fmt::count(blocks),
            fmt::bytes(i.block_size)
        ),
        format!(
            "node           {} ({}, epoch {})",
            i.node,
            if i.attached { "attached" } else { "detached" },
            i.epoch
        ),
        format!(
            "parent         {}",
            i.parent
                .as_ref()
                .map_or_else(|| "none".into(), |(name, snapshot)| format!("{name}@{snapshot}"))
        ),
        format!(
            "snapshots      {}",
            if snapshots.is_empty() {
                "none".into()
            } else {
                snapshots.join(" ")
            }
        ),
        replicas(&i.replicas),
        format!(
            "heat           {} blocks tracked, counted by {}",
            fmt::count(i.tracked_blocks),
            i.origin.map_or("nobody yet", |o| o.as_str())
        ),
        format!(
            "in RAM         {} blocks in the main region ({})",
            fmt::count(i.resident_blocks),
            fmt::bytes(ByteLen(i.resident_blocks.saturating_mul(i.block_size.0)))
        ),
        format!("reads          {}/s", fmt::count(i.reads_per_s)),
        format!("writes         {}/s", fmt::count(i.writes_per_s)),
        format!(
            "hit ratio      {}",
            i.hit_permille.map_or_else(|| "no reads".into(), fmt::permille)
        ),
        format!("read latency   {}", latency(&i.read_latency)),
        format!("write latency  {}", latency(&i.write_latency)),
    ]
}

/// Where an image's replicas are, in the line before its heat; an empty one without replicas.
fn replicas(r: &ReplicasView) -> String {
    if r.is_none() {
        return String::new();
    }
    let mut text = format!(
        "replicas       {} of {} in sync on {}",
        r.in_sync,
        r.wanted,
        list(&r.members)
    );
    if !r.joiners.is_empty() {
        text += &format!(", being synced on {}", list(&r.joiners));
    }
    text
}

fn list(nodes: &Nodes) -> String {
    nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What a change of an image's locations left behind.
fn located(image: &str, change: &Change) -> String {
    let (to, stamp) = (&change.to, change.to.stamp());
    let runs = to.runs().iter().enumerate().map(|(at, run)| {
        let end = to.runs().get(at + 1).map(|next| next.first.0 - 1);
        let blocks = match (run.first.0, end) {
            (0, None) => String::new(),
            (first, None) => format!("blocks {first} and up: "),
            (first, Some(last)) => format!("blocks {first}-{last}: "),
        };
        let joins = if run.joiners.is_empty() {
            String::new()
        } else {
            format!(", being synced on {}", list(&run.joiners))
        };
        format!("{blocks}in sync on {}{joins}", list(&run.members))
    });
    const RUNS_TOLD: usize = 3;
    let mut runs: Vec<String> = runs.take(RUNS_TOLD).collect();
    if to.runs().len() > RUNS_TOLD {
        runs.push(format!("{} more runs", to.runs().len() - RUNS_TOLD));
    }
    let what = if change.from.epoch == stamp.epoch {
        format!("{image} at epoch {}, set {}", stamp.epoch, stamp.set_version)
    } else {
        format!("{image} attached on {} at epoch {}", change.by, stamp.epoch)
    };
    let what = match change.stale {
        None => what,
        Some(taken) => format!(
            "{what} BY FORCE, from a copy of epoch {}, set {}: what was written since, up to epoch {}, set {}, is given up",
            taken.epoch, taken.set_version, change.from.epoch, change.from.set_version
        ),
    };
    format!("{what}: {}", runs.join("; "))
}

/// What was found and done about copies.
pub fn copies(image: &str, checked: &CopiesChecked) -> String {
    let blocks = plural(checked.blocks, "block");
    let from = checked.first;
    if checked.how == CheckHow::Rewrite {
        let on: Vec<_> = checked.copies.keys().map(|node| node.as_str()).collect();
        return format!("{image}: {blocks} from {from} on written anew on {}", on.join(", "));
    }
    if checked.differing == 0 {
        return format!("{image}: {blocks} from {from} on compared, all copies are equal");
    }
    let of = |(node, count): (&NodeId, &u64)| format!("{count} on {node}");
    let nodes: Vec<_> = checked.copies.iter().map(of).collect();
    let named: Vec<_> = checked.named.iter().take(8).map(|block| block.to_string()).collect();
    let more = if checked.differing > named.len() as u64 {
        " ..."
    } else {
        ""
    };
    let became = match checked.how {
        CheckHow::Compare => "left as they are".to_owned(),
        _ => format!("{} repaired", checked.repaired),
    };
    format!(
        "{image}: {blocks} from {from} on compared, {} ({}), {became}: {}{more}",
        match checked.differing {
            1 => "1 differs".to_owned(),
            count => format!("{count} differ"),
        },
        nodes.join(", "),
        named.join(" ")
    )
}

fn because(reason: &str) -> String {
    match reason {
        "" => String::new(),
        reason => format!(": {reason}"),
    }
}

/// One line for an event; `name` knows images by id.
pub fn event(event: &Event, name: &dyn Fn(ImageId) -> Option<ImageName>) -> String {
    let named = |id: ImageId| name(id).map_or_else(|| format!("image {}", brief(&id.to_string())), |n| n.to_string());
    let layer = |id: &LayerId| brief(&id.to_string()).to_owned();
    match event {
        Event::ImageCreated(e) => {
            let mut text = format!(
                "{} created on {}: {}, blocks of {}",
                e.name,
                e.node,
                fmt::bytes(e.size),
                fmt::bytes(e.block_size)
            );
            if let Some((parent, snapshot)) = &e.parent {
                text += &format!(", clone of {}@{snapshot}", named(*parent));
            }
            text
        }
        Event::ImageAttached(e) => format!(
            "{} attached on {} at epoch {} ({})",
            named(e.image),
            e.node,
            e.epoch,
            if e.device { "device" } else { "socket" }
        ),
        Event::ImageDetached { image, epoch } => format!("{} detached, epoch {epoch} ended", named(*image)),
        Event::LocationsChanged { image, change } => located(&named(*image), change),
        Event::SnapshotTaken { image, name, .. } => format!("{}@{name} taken", named(*image)),
        Event::ImageResized { image, size, .. } => format!("{} resized to {}", named(*image), fmt::bytes(*size)),
        Event::ReplicasSet { image, wanted } => format!("{} is to have {}", named(*image), plural(*wanted, "replica")),
        Event::CopiesChecked(checked) => copies(&named(checked.image), checked),
        Event::ImageExported {
            image,
            snapshot,
            path,
            format,
            allocated,
        } => {
            let at = snapshot.as_ref().map_or_else(String::new, |name| format!("@{name}"));
            format!(
                "{}{at} exported to {path} as {format}, {} on disk",
                named(*image),
                fmt::bytes(*allocated)
            )
        }
        Event::SnapshotDeleted { image, name } => format!("{}@{name} deleted", named(*image)),
        Event::ImageDeleted { image } => format!("{} deleted", named(*image)),
        Event::LayerSealed {
            layer: l,
            node,
            allocated,
        } => format!("layer {} sealed on {node}, {} in it", layer(l), fmt::bytes(*allocated)),
        Event::LayerDropped { layer: l, node } => format!("layer {} dropped by {node}", layer(l)),
        Event::NodeJoined(e) => format!(
            "{} joined: RAM {}, main {}, domain {}, heat from {}",
            e.node,
            fmt::bytes(e.ram),
            fmt::bytes(e.main),
            e.fault_domain,
            e.heat_source
        ),
        Event::NodeLeft { node } => format!("{node} left in order"),
        Event::CommandFinished {
            command,
            node,
            outcome: result,
        } => format!("{} on {node}: {}", brief(&command.to_string()), outcome(result)),
        Event::TermStarted { term, .. } => format!("term {term} won"),
        Event::Ticked { tick, .. } => format!("tick {tick}"),
        Event::HeatFolded(e) => {
            let blocks: usize = e
                .images
                .iter()
                .flat_map(|i| &i.layers)
                .map(|l| l.blocks.iter().flatten().count())
                .sum();
            let lost: u64 = e.images.iter().map(|i| i.omitted.lost).sum();
            let mut text = format!(
                "heat of {}: {} in {}, RAM {} of {}",
                e.node,
                plural(blocks as u64, "block"),
                plural(e.images.len() as u64, "image"),
                fmt::bytes(ByteLen(e.tier.front.0 + e.tier.main.0)),
                fmt::bytes(e.tier.capacity)
            );
            if e.gap > 0 {
                text += &format!(", {} missing", plural(e.gap, "report"));
            }
            if lost > 0 {
                text += &format!(", {} lost", plural(lost, "block count"));
            }
            text
        }
        Event::PolicySet { version, reason, .. } => {
            if reason.is_empty() {
                format!("policy version {version} set")
            } else {
                format!("policy version {version} set: {reason}")
            }
        }
        Event::NodeDrainSet {
            node, draining, reason, ..
        } => {
            let what = if *draining { "drains" } else { "drains no more" };
            format!("{node} {what}{}", because(reason))
        }
        Event::FaultDomainSet {
            node,
            fault_domain,
            reason,
            ..
        } => match fault_domain.as_str() {
            "" => format!("{node} is in the fault domain that it says itself{}", because(reason)),
            domain => format!("{node} is in fault domain {domain}{}", because(reason)),
        },
        Event::DigestRecorded { at, state, .. } => {
            format!("digest at #{at}: {}", brief(&hearth_protocol::chain::hex(state)))
        }
        Event::LossAccepted { positions, reason, .. } => {
            format!(
                "what another history held at #{} to #{} counts no more: {reason}",
                positions.0, positions.1
            )
        }
        Event::LogRecovered { positions, reason, .. } => {
            format!(
                "#{} to #{} were put back into the stream: {reason}",
                positions.0, positions.1
            )
        }
        Event::CommandGiven(c) => format!("{} (tick {})", command(c, &[]), c.tick),
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::command::LostNode;

    use super::*;

    #[test]
    fn blocks_print_as_runs() {
        let check = |list: &[u64], expect: &str| {
            assert_eq!(blocks(list.iter().map(|b| BlockIndex(*b))), expect);
        };
        check(&[], "");
        check(&[3, 5, 4, 9], "3-5 9");
        check(&[0, 0, 2], "0 2");
    }

    #[test]
    fn numbers_carry_the_unit_of_their_name() {
        for (name, value, expect) in [
            ("score", 5 << 16, "5.0"),
            ("coldest_resident_score", 1 << 15, "0.50"),
            ("margin_percent", 150, "150%"),
            ("budget_bytes", 64 << 20, "64 MiB"),
            ("promote_bytes_per_s_max", 64 << 20, "64 MiB/s"),
            ("half_life_s", 3_600, "1 h"),
            ("demote_below_centibursts", 25, "0.25"),
            ("bursts", 1_200, "1,200"),
        ] {
            assert_eq!(number(name, value), expect, "{name}");
        }
    }

    #[test]
    fn a_replicate_says_what_was_left_since_when() {
        let mut command = Command {
            id: hearth_protocol::CommandId(1),
            node: "node-1".parse().unwrap(),
            term: hearth_protocol::Term(1),
            tick: hearth_protocol::TickNo(40),
            expires: hearth_protocol::TickNo(60),
            order: Order::Replicate {
                layer: LayerId(2),
                image: ImageId(1),
                epoch: Epoch(1),
                set_version: SetVersion(3),
                to: "node-3".parse().unwrap(),
                blocks: None,
                bytes: ByteLen(2 << 30),
                replaces: None,
            },
            reason: Reason {
                rule: "repair/replicate".into(),
                policy_version: 1,
                numbers: [
                    ("members", 1),
                    ("wanted", 2),
                    ("degraded_at_ms", 50_520_000),
                    ("grace_ticks", 30),
                ]
                .map(|(name, value)| (name.into(), value))
                .into(),
                rests_on: vec![Seq(7)],
                lost: Vec::new(),
                lost_nodes: vec![LostNode {
                    node: "node-4".parse().unwrap(),
                    why: "same_fault_domain".into(),
                }],
            },
        };
        let images = ["appl/vm-1".parse().unwrap()];
        let told = "1 of 2 replicas left since 14:02:00, grace time 30 s over";
        let check = |command: &Command, expect: String| assert_eq!(super::command(command, &images), expect);
        check(&command, format!("replicate appl/vm-1 to node-3: {told}"));
        assert_eq!(
            reason(&command.reason).last().unwrap(),
            "lost      node node-4: same fault domain"
        );
        let Order::Replicate { blocks, .. } = &mut command.order else {
            unreachable!()
        };
        *blocks = Some(hearth_protocol::record::Extent {
            first: BlockIndex(16),
            last: BlockIndex(31),
        });
        check(&command, format!("replicate 16 blocks of appl/vm-1 to node-3: {told}"));
    }

    #[test]
    fn long_lists_of_positions_are_shortened() {
        let all: Vec<Seq> = (1..=40).map(Seq).collect();
        assert_eq!(seqs(&all), "#1 #2 #3 #4 #5 #6 … #38 #39 #40 (40 in all)");
        assert_eq!(seqs(&all[..2]), "#1 #2");
    }
}
