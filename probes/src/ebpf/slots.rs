//! Which slot of the kernel's maps belongs to which device and image.
//!
//! A slot that is given back still receives counts of programs that were running, in at most the next two windows, so it
//! rests for that long under its old name.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::{ByteLen, ImageId};

/// Windows a slot rests after its device was detached.
const REST_WINDOWS: u32 = 2;

/// A device's number as the kernel writes it into a word (`include/linux/kdev_t.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Driver.
    pub major: u32,
    /// Device.
    pub minor: u32,
}

impl DeviceNumber {
    /// The kernel's `dev_t`.
    pub fn word(self) -> u32 {
        self.major << 20 | self.minor & 0xf_ffff
    }
}

/// One slot in use or at rest.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The device it counts.
    pub device: DeviceNumber,
    /// Whose disk that is.
    pub image: ImageId,
    /// The image's block size.
    pub block_size: ByteLen,
    /// Windows left until it can be given away; `None` while in use.
    resting: Option<u32>,
}

/// All slots.
#[derive(Debug)]
pub struct Slots {
    /// Longest unused first.
    free: VecDeque<u32>,
    used: BTreeMap<u32, Slot>,
}

impl Slots {
    /// `count` free slots.
    pub fn new(count: u32) -> Self {
        Self {
            free: (0..count).collect(),
            used: BTreeMap::new(),
        }
    }

    /// The slot in use of a device.
    pub fn of(&self, device: DeviceNumber) -> Option<(u32, &Slot)> {
        let mut used = self.used.iter().map(|(number, slot)| (*number, slot));
        used.find(|(_, slot)| slot.device == device && slot.resting.is_none())
    }

    /// Takes a free slot; `None` when there is none.
    pub fn take(&mut self, device: DeviceNumber, image: ImageId, block_size: ByteLen) -> Option<u32> {
        let number = self.free.pop_front()?;
        self.used.insert(
            number,
            Slot {
                device,
                image,
                block_size,
                resting: None,
            },
        );
        Some(number)
    }

    /// Puts a slot to rest.
    pub fn rest(&mut self, number: u32) {
        if let Some(slot) = self.used.get_mut(&number) {
            slot.resting = Some(REST_WINDOWS);
        }
    }

    /// A window was drained completely: slots that rested long enough are free.
    pub fn window_drained(&mut self) {
        let mut freed = Vec::new();
        for (number, slot) in &mut self.used {
            match &mut slot.resting {
                Some(1) => freed.push(*number),
                Some(windows) => *windows -= 1,
                None => {}
            }
        }
        for number in freed {
            self.used.remove(&number);
            self.free.push_back(number);
        }
    }

    /// Slots in use or at rest, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.used.iter().map(|(number, slot)| (*number, slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_keeps_its_name_for_two_windows_after_its_device_left() {
        let device = DeviceNumber { major: 7, minor: 0 };
        let mut slots = Slots::new(1);
        let number = slots.take(device, ImageId(1), ByteLen(4096)).unwrap();
        assert_eq!(slots.take(device, ImageId(2), ByteLen(4096)), None);
        slots.rest(number);
        assert!(slots.of(device).is_none());
        for _ in 0..REST_WINDOWS {
            assert_eq!(
                slots.iter().map(|(_, slot)| slot.image).collect::<Vec<_>>(),
                [ImageId(1)]
            );
            assert_eq!(slots.take(device, ImageId(2), ByteLen(4096)), None);
            slots.window_drained();
        }
        assert_eq!(slots.take(device, ImageId(2), ByteLen(4096)), Some(number));
    }
}
