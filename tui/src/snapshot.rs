//! What was known at one moment, and the bounded past the dashboard can step through.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hearth_protocol::view::{ClusterView, DecisionView, ImageHeatView, ImageView};
use hearth_protocol::{ImageId, Seq, WallMs};

/// Snapshots kept: fifteen minutes at one a second.
pub const SNAPSHOTS_MAX: usize = 900;
/// Heat cells kept over all snapshots: 24 bytes each, so some 48 MiB.
pub const HEAT_CELLS_MAX: usize = 2_000_000;
/// How many snapshots back a heat map may come from; older ones would show another time than the header says.
const HEAT_AGE_MAX: usize = 5;

/// The cluster at one log position, as the dashboard shows it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The view, its decisions taken out.
    pub view: ClusterView,
    /// The decisions, oldest first, shared between snapshots.
    pub decisions: Vec<Arc<DecisionView>>,
    heat: BTreeMap<ImageId, Arc<ImageHeatView>>,
}

impl Snapshot {
    /// Takes a view apart, sharing the decisions that `previous` already has in the same state.
    pub fn new(mut view: ClusterView, previous: Option<&Snapshot>) -> Self {
        let known: BTreeMap<Seq, &Arc<DecisionView>> = previous
            .into_iter()
            .flat_map(|p| &p.decisions)
            .map(|d| (d.seq, d))
            .collect();
        let decisions = std::mem::take(&mut view.decisions)
            .into_iter()
            .map(|d| match known.get(&d.seq) {
                Some(old) if ***old == d => Arc::clone(old),
                _ => Arc::new(d),
            })
            .collect();
        Self {
            view,
            decisions,
            heat: BTreeMap::new(),
        }
    }

    /// The same with heat of an image, of the same moment.
    pub fn with_heat(mut self, heat: ImageHeatView) -> Self {
        self.heat.insert(heat.image, Arc::new(heat));
        self
    }

    /// An image's heat at this very moment, if it is known.
    pub fn heat(&self, image: ImageId) -> Option<&ImageHeatView> {
        self.heat.get(&image).map(AsRef::as_ref)
    }

    /// The image with that id.
    pub fn image(&self, id: ImageId) -> Option<&ImageView> {
        self.view.images.iter().find(|i| i.id == id)
    }

    /// Reads and RAM hits of all images: the cluster's hit ratio in parts per thousand, `None` without reads.
    pub fn hit_permille(&self) -> Option<u64> {
        let (mut hits, mut reads) = (0u128, 0u128);
        for image in &self.view.images {
            if let Some(permille) = image.hit_permille {
                hits += u128::from(permille) * u128::from(image.reads_per_s);
                reads += u128::from(image.reads_per_s);
            }
        }
        (reads > 0).then(|| (hits / reads) as u64)
    }

    /// The worst read p99 of all images, microseconds; `None` without reads.
    pub fn read_p99_us(&self) -> Option<u64> {
        self.view
            .images
            .iter()
            .filter(|i| i.read_latency.count > 0)
            .map(|i| i.read_latency.p99_us)
            .max()
    }
}

/// The past, oldest first.
#[derive(Debug, Clone, Default)]
pub struct History {
    ring: VecDeque<Snapshot>,
    cells: usize,
}

impl History {
    /// Adds a view; one at the log position already last replaces it, one before it starts anew (another cluster, or a
    /// log that was rolled back).
    pub fn push(&mut self, view: ClusterView) {
        match self.ring.back().map(|s| s.view.seq) {
            Some(last) if view.seq == last => {
                let mut next = Snapshot::new(view, self.ring.back());
                if let Some(back) = self.ring.back_mut() {
                    next.heat = std::mem::take(&mut back.heat);
                    *back = next;
                }
                return;
            }
            Some(last) if view.seq < last => {
                self.ring.clear();
                self.cells = 0;
            }
            _ => {}
        }
        let next = Snapshot::new(view, self.ring.back());
        self.ring.push_back(next);
        if self.ring.len() > SNAPSHOTS_MAX
            && let Some(old) = self.ring.pop_front()
        {
            self.cells -= old.heat.values().map(|h| h.cells.len()).sum::<usize>();
        }
    }

    /// Adds an image's heat to the newest snapshot.
    pub fn push_heat(&mut self, heat: ImageHeatView) {
        let Some(back) = self.ring.back_mut() else { return };
        self.cells += heat.cells.len();
        if let Some(old) = back.heat.insert(heat.image, Arc::new(heat)) {
            self.cells -= old.cells.len();
        }
        let newest = self.ring.len() - 1;
        for snapshot in self.ring.iter_mut().take(newest) {
            if self.cells <= HEAT_CELLS_MAX {
                break;
            }
            self.cells -= snapshot.heat.values().map(|h| h.cells.len()).sum::<usize>();
            snapshot.heat.clear();
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// The n-th, 0 the oldest.
    pub fn get(&self, index: usize) -> Option<&Snapshot> {
        self.ring.get(index)
    }

    /// Where the snapshot at this log position is, or the last one before it.
    pub fn at_or_before(&self, seq: Seq) -> Option<usize> {
        self.ring.partition_point(|s| s.view.seq <= seq).checked_sub(1)
    }

    /// Where the last snapshot not after this time is.
    pub fn at_time(&self, time: WallMs) -> Option<usize> {
        self.ring.partition_point(|s| s.view.time <= time).checked_sub(1)
    }

    /// An image's heat as of the n-th snapshot, not older than a few snapshots.
    pub fn heat(&self, index: usize, image: ImageId) -> Option<&ImageHeatView> {
        (index.saturating_sub(HEAT_AGE_MAX)..=index)
            .rev()
            .find_map(|i| self.ring.get(i)?.heat.get(&image))
            .map(AsRef::as_ref)
    }

    /// A figure of the `width` snapshots that end with the n-th, oldest first.
    pub fn series(&self, index: usize, width: usize, figure: impl Fn(&Snapshot) -> Option<u64>) -> Vec<Option<u64>> {
        let end = (index + 1).min(self.ring.len());
        self.ring.range(end.saturating_sub(width)..end).map(figure).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::view_at;

    #[test]
    fn the_past_is_bounded_and_ordered() {
        let mut history = History::default();
        for seq in 1..=(SNAPSHOTS_MAX as u64 + 10) {
            history.push(view_at(seq));
            history.push(view_at(seq));
        }
        assert_eq!(history.len(), SNAPSHOTS_MAX);
        assert_eq!(history.get(0).unwrap().view.seq, Seq(11));
        assert_eq!(history.at_or_before(Seq(10)), None);
        assert_eq!(history.at_or_before(Seq(12)), Some(1));
        history.push(view_at(3));
        assert_eq!(history.len(), 1, "a rolled back log starts anew");
    }

    #[test]
    fn unchanged_decisions_are_shared() {
        let mut history = History::default();
        history.push(view_at(1));
        history.push(view_at(2));
        let (a, b) = (history.get(0).unwrap(), history.get(1).unwrap());
        assert!(!a.decisions.is_empty());
        assert!(Arc::ptr_eq(&a.decisions[0], &b.decisions[0]));
    }

    #[test]
    fn heat_memory_is_bounded() {
        let mut history = History::default();
        let cell = hearth_protocol::view::HeatCell {
            block: hearth_protocol::BlockIndex(0),
            score: hearth_protocol::HeatScore(1),
            ram: false,
        };
        for seq in 1..=8 {
            history.push(view_at(seq));
            history.push_heat(ImageHeatView {
                image: ImageId(1),
                blocks: 1,
                block_size: hearth_protocol::ByteLen(4096),
                cells: vec![cell; HEAT_CELLS_MAX / 4],
                omitted: 0,
            });
        }
        assert!(history.cells <= HEAT_CELLS_MAX);
        assert!(history.heat(7, ImageId(1)).is_some());
        assert!(history.get(0).unwrap().heat.is_empty());
    }
}
