//! Writes of clients that wait for each other, and how they are put together meanwhile.
//!
//! The session carries out writes that share a block one after the other. Here a write waits until those before it that
//! share a block with it have ended, and what follows it on the disk joins it: so a client that writes one block from its
//! beginning to its end in small steps, many at a time, gets a few large writes.
//!
//! Invariants: a write that waits is begun behind every earlier one that shares a block with it; only what nobody was
//! answered for waits. It is no lock: the session orders writes also without this.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hearth_replication::owner::Ask;
use hearth_replication::request::Extent;

use super::disk::denied;
use super::image::{Asked, Ended, Replica};
use super::piece::{Body, Piece};
use super::shape::Shape;
use crate::disk::{Begun, Change, DiskError};
use crate::shared::Shared;

/// Bytes up to which writes are put together; a larger one stays what it is.
const JOINED_BYTES_MAX: usize = 256 << 10;

/// Operations of an image that the session is given at a time. It holds few while an image is taken over or handed over, and
/// refuses more.
const BEGUN_MAX: usize = 128;

type Tell = Box<dyn FnOnce(Result<(), DiskError>) + Send>;

/// Writes of which each begins where the one before it ends.
struct Joined {
    offset: u64,
    length: usize,
    fua: bool,
    parts: Vec<(Shared, Tell)>,
}

impl Joined {
    /// Takes a write that follows, or gives it back.
    fn join(&mut self, mut next: Joined) -> Option<Joined> {
        let follows = next.offset == self.offset + self.length as u64;
        if !follows || next.fua != self.fua || self.length + next.length > JOINED_BYTES_MAX {
            return Some(next);
        }
        self.length += next.length;
        self.parts.append(&mut next.parts);
        None
    }

    fn extent(&self, shape: &Shape) -> Extent {
        shape.extent(self.offset, self.length as u64)
    }
}

/// What waits, or is due.
enum Turn {
    Writes(Joined),
    Flush(Tell),
}

#[derive(Default)]
struct State {
    /// Operations that the session has.
    begun: usize,
    /// What those of them change that are writes.
    under_way: Vec<Extent>,
    /// In the order in which they came.
    waiting: VecDeque<Turn>,
}

impl State {
    /// Takes those out that wait for nobody any more, and counts them as under way.
    fn due(&mut self, shape: &Shape) -> Vec<Turn> {
        let mut due = Vec::new();
        let mut behind: Vec<Extent> = Vec::new();
        for turn in std::mem::take(&mut self.waiting) {
            let extent = match &turn {
                Turn::Writes(writes) => Some(writes.extent(shape)),
                Turn::Flush(_) => None,
            };
            let waits = extent.is_some_and(|extent| {
                let mut others = self.under_way.iter().chain(&behind);
                others.any(|other| other.overlaps(extent))
            });
            if waits || self.begun >= BEGUN_MAX {
                behind.extend(extent);
                self.waiting.push_back(turn);
            } else {
                self.begun += 1;
                self.under_way.extend(extent);
                due.push(turn);
            }
        }
        due
    }

    fn ended(&mut self, extent: Option<Extent>) {
        self.begun -= 1;
        let at = extent.and_then(|extent| self.under_way.iter().position(|other| *other == extent));
        if let Some(at) = at {
            self.under_way.swap_remove(at);
        }
    }
}

/// See the module.
pub(super) struct Turns {
    replica: Arc<Replica>,
    state: Mutex<State>,
}

impl Turns {
    pub(super) fn new(replica: Arc<Replica>) -> Arc<Self> {
        Arc::new(Self {
            replica,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins changes, or lets them wait for those before them. Writes lie within the image.
    pub(super) fn begin(self: &Arc<Self>, changes: Vec<Begun>) {
        let due = {
            let mut state = self.state();
            for Begun { change, tell } in changes {
                append(
                    &mut state.waiting,
                    match change {
                        Change::Write { offset, data, fua } => Turn::Writes(Joined {
                            offset,
                            length: data.len(),
                            fua,
                            parts: vec![(data, tell)],
                        }),
                        Change::Flush => Turn::Flush(tell),
                    },
                );
            }
            state.due(self.replica.shape())
        };
        let asked: Vec<Asked> = due.into_iter().map(|turn| self.asked(turn)).collect();
        if !asked.is_empty() {
            self.replica.begin(asked);
        }
    }

    fn asked(self: &Arc<Self>, turn: Turn) -> Asked {
        let this = Arc::clone(self);
        let writes = match turn {
            Turn::Writes(writes) => writes,
            Turn::Flush(tell) => {
                return Asked {
                    ask: Ask::Flush,
                    piece: None,
                    tell: Box::new(move |ended: Ended| {
                        this.ended(None);
                        tell(ended.map(drop).map_err(denied));
                    }),
                };
            }
        };
        let extent = writes.extent(self.replica.shape());
        let (offset, fua) = (writes.offset, writes.fua);
        let (mut bytes, tell): (Vec<Shared>, Vec<Tell>) = writes.parts.into_iter().unzip();
        let bytes = match bytes.len() {
            1 => bytes.remove(0),
            _ => bytes.iter().map(|part| &**part).collect::<Vec<_>>().concat().into(),
        };
        Asked {
            ask: Ask::Write { extent, fua },
            piece: Some(Piece {
                offset,
                body: Body::Data(bytes),
            }),
            tell: Box::new(move |ended: Ended| {
                this.ended(Some(extent));
                let ended = ended.map(drop);
                tell.into_iter().for_each(|tell| tell(ended.clone().map_err(denied)));
            }),
        }
    }

    /// One ended: those that waited for it begin, on another thread, for this one must not wait for the disk.
    fn ended(self: &Arc<Self>, extent: Option<Extent>) {
        let due = {
            let mut state = self.state();
            state.ended(extent);
            state.due(self.replica.shape())
        };
        if !due.is_empty() {
            let asked = due.into_iter().map(|turn| self.asked(turn)).collect();
            self.replica.begin_elsewhere(asked);
        }
    }
}

/// Puts a turn behind others; writes that follow the last one on the disk join it.
fn append(waiting: &mut VecDeque<Turn>, next: Turn) {
    let next = match (waiting.back_mut(), next) {
        (Some(Turn::Writes(last)), Turn::Writes(next)) => last.join(next).map(Turn::Writes),
        (_, next) => Some(next),
    };
    waiting.extend(next);
}

#[cfg(test)]
mod tests {
    use hearth_protocol::{BlockIndex, LayerId};

    use super::*;

    const KIB: u64 = 1 << 10;

    fn write(offset: u64, length: u64) -> Turn {
        let tell: Tell = Box::new(|_| {});
        Turn::Writes(Joined {
            offset,
            length: length as usize,
            fua: false,
            parts: vec![(vec![0; length as usize].into(), tell)],
        })
    }

    /// Where what is due begins, and how long it is; a flush is nowhere.
    fn places(due: &[Turn]) -> Vec<(u64, usize)> {
        let place = |turn: &Turn| match turn {
            Turn::Writes(writes) => (writes.offset, writes.length),
            Turn::Flush(_) => (u64::MAX, 0),
        };
        due.iter().map(place).collect()
    }

    #[test]
    fn writes_to_one_block_wait_for_each_other_and_join() {
        let shape = Shape {
            name: "a/b".parse().unwrap(),
            size: 64 << 20,
            block_size: 64 * KIB,
            layer: LayerId(1),
        };
        let mut state = State::default();
        append(&mut state.waiting, write(0, 4 * KIB));
        assert_eq!(places(&state.due(&shape)), [(0, 4096)]);
        for at in 1..4 {
            append(&mut state.waiting, write(at * 4 * KIB, 4 * KIB));
        }
        // The same place again, another block, and what follows what waits, but came behind both.
        append(&mut state.waiting, write(4 * KIB, 4 * KIB));
        append(&mut state.waiting, write(64 * KIB, 4 * KIB));
        append(&mut state.waiting, write(16 * KIB, 4 * KIB));
        assert_eq!(places(&state.due(&shape)), [(65_536, 4096)]);
        let block = |at| Some(Extent::block(BlockIndex(at)));
        state.ended(block(0));
        assert_eq!(places(&state.due(&shape)), [(4096, 3 * 4096)]);
        state.ended(block(0));
        assert_eq!(places(&state.due(&shape)), [(4096, 4096)]);
        state.ended(block(0));
        assert_eq!(places(&state.due(&shape)), [(16_384, 4096)]);
        state.ended(block(0));
        state.ended(block(1));
        assert!(state.under_way.is_empty() && state.waiting.is_empty() && state.begun == 0);
        // More than the session takes at a time.
        for at in 0..BEGUN_MAX as u64 + 2 {
            append(&mut state.waiting, Turn::Flush(Box::new(|_| {})));
            append(&mut state.waiting, write(at * 64 * KIB, KIB));
        }
        assert_eq!(state.due(&shape).len(), BEGUN_MAX);
        state.ended(None);
        assert_eq!(places(&state.due(&shape)), [(u64::MAX, 0)]);
    }
}
