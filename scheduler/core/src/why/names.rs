//! What people call images and layers, as the log named them, also those that are gone.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::{Event, ImageId, ImageName, LayerId, SnapshotName};

/// What is known of one layer.
#[derive(Debug, Clone)]
struct Named {
    image: ImageId,
    /// The snapshot that sealed it.
    snapshot: Option<SnapshotName>,
    top: bool,
}

/// Every name that the log gave so far.
#[derive(Debug, Clone, Default)]
pub struct Names {
    images: BTreeMap<ImageId, ImageName>,
    layers: BTreeMap<LayerId, Named>,
}

impl Names {
    /// Takes what a valid event says.
    pub fn learn(&mut self, event: &Event) {
        match event {
            Event::ImageCreated(created) => {
                self.images.insert(created.image, created.name.clone());
                for (depth, layer) in created.layers.iter().enumerate() {
                    // A clone's lower layers are its parent's.
                    self.layers.entry(*layer).or_insert(Named {
                        image: created.image,
                        snapshot: None,
                        top: depth == 0,
                    });
                }
            }
            Event::SnapshotTaken {
                image,
                name,
                sealed,
                top,
            } => self.pushed(*image, *sealed, Some(name), *top),
            Event::ImageResized { image, sealed, top, .. } => self.pushed(*image, *sealed, None, *top),
            _ => {}
        }
    }

    fn pushed(&mut self, image: ImageId, sealed: LayerId, snapshot: Option<&SnapshotName>, top: LayerId) {
        for (layer, is_top) in [(sealed, false), (top, true)] {
            let named = self.layers.entry(layer).or_insert(Named {
                image,
                snapshot: None,
                top: is_top,
            });
            named.top &= is_top;
        }
        if let (Some(named), Some(snapshot)) = (self.layers.get_mut(&sealed), snapshot) {
            named.snapshot = Some(snapshot.clone());
        }
    }

    /// The names of some images; with its id, where another one of them has the same name.
    pub fn of_images(&self, ids: &BTreeSet<ImageId>) -> BTreeMap<ImageId, String> {
        let known = ids
            .iter()
            .filter_map(|id| Some((*id, self.images.get(id)?.to_string())));
        told_apart(known.collect())
    }

    /// What some layers are; with its id, where another one of them is called the same.
    pub fn of_layers(&self, ids: &BTreeSet<LayerId>) -> BTreeMap<LayerId, String> {
        let name = |id: &LayerId| {
            let named = self.layers.get(id)?;
            let image = self.images.get(&named.image)?;
            Some(match &named.snapshot {
                Some(snapshot) => format!("{image}@{snapshot}"),
                None if named.top => format!("top of {image}"),
                None => format!("lower layer of {image}"),
            })
        };
        told_apart(ids.iter().filter_map(|id| Some((*id, name(id)?))).collect())
    }
}

fn told_apart<T: Copy + Ord + std::fmt::Display>(mut names: BTreeMap<T, String>) -> BTreeMap<T, String> {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for name in names.values() {
        *count.entry(name.clone()).or_default() += 1;
    }
    for (id, name) in &mut names {
        if count[name] > 1 {
            *name = format!("{name} ({id})");
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use hearth_protocol::event::ImageCreated;
    use hearth_protocol::{ByteLen, SetVersion};

    use super::*;

    fn created(image: u128, name: &str, layers: &[u128]) -> Event {
        Event::ImageCreated(ImageCreated {
            image: ImageId(image),
            name: name.parse().unwrap(),
            size: ByteLen(1 << 20),
            block_size: ByteLen(65_536),
            layers: layers.iter().copied().map(LayerId).collect(),
            parent: None,
            node: "n1".parse().unwrap(),
            set_version: SetVersion(1),
            members: Default::default(),
        })
    }

    #[test]
    fn layers_are_called_by_their_snapshot_their_image_or_both_and_their_id() {
        let mut names = Names::default();
        names.learn(&created(1, "masters/os", &[10]));
        names.learn(&Event::SnapshotTaken {
            image: ImageId(1),
            name: "v1".parse().unwrap(),
            sealed: LayerId(10),
            top: LayerId(11),
        });
        names.learn(&created(2, "appl/vm", &[20, 10]));
        for (sealed, top) in [(20, 21), (21, 22)] {
            names.learn(&Event::ImageResized {
                image: ImageId(2),
                size: ByteLen(2 << 20),
                sealed: LayerId(sealed),
                top: LayerId(top),
            });
        }
        names.learn(&created(3, "appl/vm", &[30]));
        let check = |layers: &[u128], expect: &[&str]| {
            let ids = layers.iter().copied().map(LayerId).collect();
            let found: Vec<_> = names.of_layers(&ids).into_values().collect();
            assert_eq!(found, expect);
        };
        check(&[10, 11, 22], &["masters/os@v1", "top of masters/os", "top of appl/vm"]);
        check(&[20, 99], &["lower layer of appl/vm"]);
        let ids = [LayerId(20), LayerId(21)].map(|id| format!("lower layer of appl/vm ({id})"));
        check(&[20, 21], &[&ids[0], &ids[1]]);
        let images = names.of_images(&[1, 2, 3].map(ImageId).into());
        assert_eq!(images[&ImageId(1)], "masters/os");
        assert_eq!(images[&ImageId(3)], format!("appl/vm ({})", ImageId(3)));
    }
}
