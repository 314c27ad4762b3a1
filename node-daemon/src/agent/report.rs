//! Heat windows into heat reports: each block is told with the layer that holds it now, and what does not fit is
//! summed up exactly.

use std::collections::BTreeMap;

use hearth_probes::source::{ImageWindow, Window};
use hearth_probes::tally::summary;
use hearth_protocol::heat::{BlockHeat, ImageHeat, LayerHeat, Omitted, pack};
use hearth_protocol::limits::HEAT_RECORDS_PER_REPORT_MAX;
use hearth_protocol::{BlockIndex, LayerId, heat::HeatOrigin};

/// What a report needs to know of an image that had accesses.
pub struct ImageContext {
    /// The layer that holds a block now; for a hole the layer that a write would go to.
    pub layer_of: Box<dyn Fn(BlockIndex) -> LayerId>,
    /// Block reads answered from RAM since the last report.
    pub ram_hits: u64,
    /// Block reads not answered from RAM since the last report.
    pub ram_misses: u64,
}

/// Records that all images of one report may have together: at 13 bytes each it stays under the message limit.
pub const RECORDS_MAX: usize = HEAT_RECORDS_PER_REPORT_MAX * 3;

/// Blocks that each of `windows` may report, so that together they stay under [`RECORDS_MAX`]: an equal share, what
/// small ones leave going to the others.
fn share(windows: &[usize]) -> usize {
    let mut left = RECORDS_MAX;
    let mut sizes = windows.to_vec();
    sizes.sort_unstable();
    let mut count = sizes.len();
    for size in sizes {
        let equal = left / count.max(1);
        if size > equal {
            return equal.min(HEAT_RECORDS_PER_REPORT_MAX);
        }
        left -= size;
        count -= 1;
    }
    HEAT_RECORDS_PER_REPORT_MAX
}

/// Turns one source's window into the images of a report; `context` is `None` for images that are not served here
/// any more, whose counts are dropped.
pub fn images(
    origin: HeatOrigin,
    window: &Window,
    mut context: impl FnMut(&ImageWindow) -> Option<ImageContext>,
) -> Vec<ImageHeat> {
    let sizes: Vec<_> = window.images.iter().map(|image| image.blocks.len()).collect();
    let blocks_max = share(&sizes);
    window
        .images
        .iter()
        .filter_map(|image| Some(one(origin, image, blocks_max, context(image)?)))
        .collect()
}

fn one(origin: HeatOrigin, window: &ImageWindow, blocks_max: usize, context: ImageContext) -> ImageHeat {
    let mut omitted = Omitted {
        lost: window.lost,
        ..Omitted::default()
    };
    let mut kept: Vec<&BlockHeat> = window.blocks.iter().collect();
    if kept.len() > blocks_max {
        // Hottest first; ties by block, so that the same counts always give the same report.
        kept.sort_by_key(|b| (std::cmp::Reverse((b.bursts, b.reads, b.writes)), b.block));
        for cold in kept.drain(blocks_max..) {
            omitted.blocks += 1;
            omitted.reads += u64::from(cold.reads);
            omitted.writes += u64::from(cold.writes);
            omitted.bytes += cold.bytes;
        }
        kept.sort_by_key(|b| b.block);
    }
    let mut layers: BTreeMap<LayerId, Vec<BlockHeat>> = BTreeMap::new();
    for block in kept {
        layers.entry((context.layer_of)(block.block)).or_default().push(*block);
    }
    ImageHeat {
        image: window.image,
        origin,
        layers: layers
            .into_iter()
            .map(|(layer, blocks)| LayerHeat {
                layer,
                blocks: pack(&blocks),
            })
            .collect(),
        omitted,
        read_latency: summary(&window.read_latency),
        write_latency: summary(&window.write_latency),
        ram_hits: context.ram_hits,
        ram_misses: context.ram_misses,
    }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;
    use hearth_protocol::{ByteLen, ImageId};

    use super::*;

    fn window(blocks: usize) -> Window {
        let block = |i: usize| BlockHeat {
            block: BlockIndex(i as u64),
            reads: 1 + (i % 7) as u32,
            writes: (i % 3) as u32,
            bursts: 1 + (i % 5) as u32,
            bytes: 4096,
        };
        let histogram = || Histogram::new(3).unwrap();
        Window {
            untimed_total: 0,
            images: vec![ImageWindow {
                image: ImageId(1),
                block_size: ByteLen(65536),
                blocks: (0..blocks).map(block).collect(),
                lost: 5,
                read_latency: histogram(),
                write_latency: histogram(),
            }],
            ..Window::default()
        }
    }

    /// Nothing is lost between counting and reporting: told + left out = counted.
    #[test]
    fn what_does_not_fit_is_summed_up_exactly() {
        for blocks in [0, 10, HEAT_RECORDS_PER_REPORT_MAX, HEAT_RECORDS_PER_REPORT_MAX + 1000] {
            let window = window(blocks);
            let counted: u64 = window.images[0].blocks.iter().map(|b| u64::from(b.reads)).sum();
            let told = images(HeatOrigin::Ebpf, &window, |_| {
                Some(ImageContext {
                    layer_of: Box::new(|b| LayerId(u128::from(b.0 % 2))),
                    ram_hits: 3,
                    ram_misses: 4,
                })
            });
            let image = &told[0];
            let records: Vec<_> = image.layers.iter().flat_map(|l| l.blocks.unpack().unwrap()).collect();
            let reads: u64 = records.iter().map(|b| u64::from(b.reads)).sum();
            assert_eq!(reads + image.omitted.reads, counted);
            assert_eq!(records.len() as u64 + image.omitted.blocks, blocks as u64);
            assert_eq!(image.omitted.lost, 5);
            assert!(image.layers.iter().all(|l| {
                l.blocks
                    .unpack()
                    .unwrap()
                    .iter()
                    .all(|b| LayerId(u128::from(b.block.0 % 2)) == l.layer)
            }));
        }
    }

    #[test]
    fn small_images_leave_their_share_to_large_ones() {
        assert_eq!(share(&[]), HEAT_RECORDS_PER_REPORT_MAX);
        assert_eq!(share(&[10, HEAT_RECORDS_PER_REPORT_MAX]), HEAT_RECORDS_PER_REPORT_MAX);
        let each = share(&[10, 100_000, 100_000, 100_000, 100_000]);
        assert_eq!(each, (RECORDS_MAX - 10) / 4);
    }
}
