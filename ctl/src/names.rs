//! Names as they are typed: `project/name@snapshot`, `project/name:block`, `setting=value`.

use std::str::FromStr;

use hearth_protocol::policy::TierPolicy;
use hearth_protocol::{BlockIndex, ByteLen, ImageName, SnapshotName};

/// An image's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageAt {
    /// The image.
    pub image: ImageName,
    /// Its snapshot.
    pub snapshot: SnapshotName,
}

impl FromStr for ImageAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (image, snapshot) = text
            .split_once('@')
            .ok_or("name a snapshot: project/name@snapshot, such as masters/os@v1")?;
        Ok(Self {
            image: image
                .parse()
                .map_err(|e: hearth_protocol::ids::NameError| e.to_string())?,
            snapshot: snapshot
                .parse()
                .map_err(|e: hearth_protocol::ids::NameError| e.to_string())?,
        })
    }
}

/// An image, or its snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaybeAt {
    /// The image.
    pub image: ImageName,
    /// Its snapshot, if one is named.
    pub snapshot: Option<SnapshotName>,
}

impl FromStr for MaybeAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('@') {
            let at: ImageAt = text.parse()?;
            return Ok(Self {
                image: at.image,
                snapshot: Some(at.snapshot),
            });
        }
        let image = text
            .parse()
            .map_err(|e: hearth_protocol::ids::NameError| e.to_string())?;
        Ok(Self { image, snapshot: None })
    }
}

/// An image's block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOf {
    /// The image.
    pub image: ImageName,
    /// Its block.
    pub block: BlockIndex,
}

impl FromStr for BlockOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (image, block) = text
            .rsplit_once(':')
            .ok_or("name a block: project/name:number, such as appl/vm-1:812")?;
        Ok(Self {
            image: image
                .parse()
                .map_err(|e: hearth_protocol::ids::NameError| e.to_string())?,
            block: BlockIndex(
                block
                    .parse()
                    .map_err(|_| format!("{block:?} is no block number: use a whole number, such as appl/vm-1:812"))?,
            ),
        })
    }
}

/// One change of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    name: String,
    value: String,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .ok_or("write name=value, such as threshold_bursts=3")?;
        let setting = Self {
            name: name.replace('-', "_"),
            value: value.to_owned(),
        };
        // A wrong name or value is said before anybody is asked.
        setting.apply(&mut TierPolicy::default())?;
        Ok(setting)
    }
}

impl Setting {
    /// Changes the policy.
    ///
    /// # Errors
    /// One sentence that says which names there are, or what the value should be.
    pub fn apply(&self, policy: &mut TierPolicy) -> Result<(), String> {
        let value = &self.value;
        let number = || -> Result<u64, String> {
            value
                .parse()
                .map_err(|_| format!("{} is {value:?}, use a whole number", self.name))
        };
        let bytes = || -> Result<u64, String> {
            let len: ByteLen = value.parse().map_err(|e| format!("{}: {e}", self.name))?;
            Ok(len.0)
        };
        match self.name.as_str() {
            "enabled" => {
                policy.enabled = value
                    .parse()
                    .map_err(|_| format!("enabled is {value:?}, use true or false"))?;
            }
            "half_life_s" => policy.half_life_s = number()?,
            "margin_percent" => policy.margin_percent = number()?,
            "threshold_bursts" => policy.threshold_bursts = number()?,
            "promote_bytes_per_s_max" => policy.promote_bytes_per_s_max = bytes()?,
            "demote_below_centibursts" => policy.demote_below_centibursts = number()?,
            "in_flight_bytes_max" => policy.in_flight_bytes_max = bytes()?,
            other => {
                return Err(format!(
                    "the tier policy has no {other:?}: it has enabled, half_life_s, margin_percent, threshold_bursts, \
                     promote_bytes_per_s_max, demote_below_centibursts and in_flight_bytes_max"
                ));
            }
        }
        policy.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let at: ImageAt = "masters/os@v1".parse().unwrap();
        assert_eq!((at.image.as_str(), at.snapshot.as_str()), ("masters/os", "v1"));
        assert!("masters/os".parse::<ImageAt>().unwrap_err().contains("@snapshot"));
        let image: MaybeAt = "appl/vm-1".parse().unwrap();
        assert_eq!(image.snapshot, None);
        let at: MaybeAt = "appl/vm-1@v1".parse().unwrap();
        assert_eq!(at.snapshot.unwrap().as_str(), "v1");
        assert!("appl/vm-1@".parse::<MaybeAt>().is_err());
        let block: BlockOf = "appl/vm-1:812".parse().unwrap();
        assert_eq!((block.image.as_str(), block.block.0), ("appl/vm-1", 812));
        for bad in ["appl/vm-1", "appl/vm-1:x", ":5", "vm:5"] {
            assert!(bad.parse::<BlockOf>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_field_of_the_policy_can_be_set() {
        let json = serde_json::to_value(TierPolicy::default()).unwrap();
        for name in json.as_object().unwrap().keys() {
            let value = if name == "enabled" { "false" } else { "200" };
            let setting: Setting = format!("{name}={value}").parse().unwrap();
            let mut policy = TierPolicy::default();
            setting.apply(&mut policy).unwrap();
            assert_ne!(policy, TierPolicy::default(), "{name}");
        }
        let setting: Setting = "promote-bytes-per-s-max=128MiB".parse().unwrap();
        let mut policy = TierPolicy::default();
        setting.apply(&mut policy).unwrap();
        assert_eq!(policy.promote_bytes_per_s_max, 128 << 20);
        for bad in ["half_life_s", "half_life_s=soon", "margin_percent=50", "speed=9"] {
            assert!(bad.parse::<Setting>().is_err(), "{bad}");
        }
    }
}
