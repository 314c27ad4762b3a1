//! Queues over numbered blocks, linked through arrays: what every comparison policy is made of.

const NONE: u32 = u32::MAX;

/// `N` queues; a block stands in one of them at most.
pub struct Lists<const N: usize> {
    links: Vec<(u32, u32)>,
    at: Vec<u8>,
    ends: [(u32, u32); N],
    lens: [usize; N],
}

impl<const N: usize> Lists<N> {
    /// Empty queues for blocks below `blocks`.
    pub fn new(blocks: usize) -> Self {
        Self {
            links: vec![(NONE, NONE); blocks],
            at: vec![N as u8; blocks],
            ends: [(NONE, NONE); N],
            lens: [0; N],
        }
    }

    /// The queue that holds a block.
    pub fn of(&self, block: u32) -> Option<usize> {
        let at = usize::from(self.at[block as usize]);
        (at < N).then_some(at)
    }

    /// Blocks in a queue.
    pub fn len(&self, list: usize) -> usize {
        self.lens[list]
    }

    /// Takes a block out of its queue, if it stands in one.
    pub fn remove(&mut self, block: u32) {
        let Some(list) = self.of(block) else { return };
        let (newer, older) = self.links[block as usize];
        match newer {
            NONE => self.ends[list].0 = older,
            newer => self.links[newer as usize].1 = older,
        }
        match older {
            NONE => self.ends[list].1 = newer,
            older => self.links[older as usize].0 = newer,
        }
        self.at[block as usize] = N as u8;
        self.lens[list] -= 1;
    }

    /// Makes a block the newest of a queue, wherever it stood before.
    pub fn push(&mut self, list: usize, block: u32) {
        self.remove(block);
        let newest = self.ends[list].0;
        self.links[block as usize] = (NONE, newest);
        match newest {
            NONE => self.ends[list].1 = block,
            newest => self.links[newest as usize].0 = block,
        }
        self.ends[list].0 = block;
        self.at[block as usize] = list as u8;
        self.lens[list] += 1;
    }

    /// The oldest of a queue.
    pub fn oldest(&self, list: usize) -> Option<u32> {
        let oldest = self.ends[list].1;
        (oldest != NONE).then_some(oldest)
    }

    /// Takes the oldest out of a queue.
    pub fn pop(&mut self, list: usize) -> Option<u32> {
        let oldest = self.oldest(list)?;
        self.remove(oldest);
        Some(oldest)
    }
}
