//! The volume config: any text, and any text that is sealed by a holder of the volume key.

use kmsfs::crypto::Suite;
use kmsfs::format::config::{self, MAX_CONFIG_LEN};
use kmsfs::keys::volume::Unlocked;

use super::input::Input;
use super::volume::{Scripted, VOLUME_ID, keys};

/// Bytes: how a sealed config is damaged, and the file.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut damage = Input::new(input.take(11));
    let file = input.rest();
    // A body without a seal gets one, so that the fuzzer need not find it.
    let with_seal = std::str::from_utf8(file).map(|body| config::seal(body, &[0; 32]));
    let parsed =
        config::parse(file).or_else(|error| with_seal.map_or(Err(error), |file| config::parse(file.as_bytes())));
    let Ok(parsed) = parsed else { return };
    let body = parsed.config.body().expect("it was parsed");
    let again = config::parse(config::seal(&body, &parsed.mac).as_bytes());
    if body.len() < MAX_CONFIG_LEN - 200 {
        assert!(
            again.expect("our own config").config == parsed.config,
            "a config says something else when it is written again"
        );
    }
    // The key is that of the corpus's volume; a config of another one has no key here.
    let Some(suite) = Suite::from_name(&parsed.config.suite) else { return };
    if parsed.config.id() != Ok(VOLUME_ID) {
        return;
    }
    let sealed = config::seal(&parsed.body, &keys(suite).config_mac(parsed.body.as_bytes()));
    let opened = config::parse(sealed.as_bytes()).expect("it was parsed");
    if let Ok(unlocked) = Unlocked::open(&opened, &Scripted, None) {
        assert!(*unlocked.config() == parsed.config);
    }
    let mut other = sealed.clone().into_bytes();
    if damage.damage(&mut other)
        && let Ok(changed) = config::parse(&other)
    {
        assert!(Unlocked::open(&changed, &Scripted, None).is_err(), "a config that was changed is believed");
    }
}
