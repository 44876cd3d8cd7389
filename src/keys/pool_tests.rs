//! Data keys made ahead, with a scripted provider.

use super::*;
use crate::keys::providers::scripted::{Answer, ScriptedProvider};

fn pool(remote: bool, files_per_data_key: u32) -> (Arc<ScriptedProvider>, Pool) {
    pool_with(remote, files_per_data_key, KeyLimits::default())
}

fn pool_with(remote: bool, files_per_data_key: u32, limits: KeyLimits) -> (Arc<ScriptedProvider>, Pool) {
    let provider = Arc::new(ScriptedProvider::new("k", remote));
    let mint = Arc::new(Mint::for_tests(provider.clone()));
    (provider, Pool::new(mint, files_per_data_key, limits, Arc::default()))
}

const SHORT: KeyLimits = KeyLimits {
    entries: std::num::NonZeroUsize::MIN,
    max_age: Duration::from_secs(20),
    stale_grace: Duration::ZERO,
    calls_per_second: None,
};

/// Lets everything that is ready or in use become older.
fn age(pool: &Pool, by: Duration) {
    let mut state = pool.shared.state();
    let State { current, ready, stale, .. } = &mut *state;
    let in_use = current.iter_mut().map(|(minted, _)| minted);
    in_use.chain(ready).chain(stale).for_each(|minted| minted.since = minted.since.before(by));
}

fn kind(error: &KeyError) -> Option<ProviderErrorKind> {
    error.provider_kind()
}

fn until(pool: &Pool, holds: impl Fn(&State) -> bool) {
    let start = Moment::now();
    while !holds(&pool.shared.state()) {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
}

#[test]
fn a_data_key_serves_as_many_files_as_it_may() {
    for remote in [false, true] {
        let (_, pool) = pool(remote, 3);
        let ids: Vec<_> = (0..7).map(|_| pool.take().unwrap().data_key_id).collect();
        assert!(ids[0] == ids[2] && ids[2] != ids[3] && ids[3] == ids[5] && ids[5] != ids[6]);
    }
}

#[test]
fn a_near_provider_is_asked_for_what_is_needed_only() {
    let (provider, pool) = pool(false, 1);
    for _ in 0..5 {
        pool.take().unwrap();
    }
    assert_eq!(provider.calls().generate, 5);
}

#[test]
fn keys_are_made_ahead_and_more_of_them_when_somebody_waits() {
    let (provider, pool) = pool(true, 1);
    pool.take().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    provider.hold();
    for _ in 0..FIRST_DEPTH {
        assert!(pool.take_ready().is_some());
    }
    assert!(pool.take_ready().is_none());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.take().is_ok());
        until(&pool, |state| state.depth == 2 * FIRST_DEPTH);
        provider.release();
        assert!(waiting.join().unwrap());
    });
    let wanted = 2 + FIRST_DEPTH;
    until(&pool, |state| state.ready.len() == wanted && state.calls == 0);
    assert_eq!(pool.read().wanted, wanted as u64, "no more than were taken");
}

#[test]
fn few_files_cost_few_calls_however_often_somebody_waits() {
    let (provider, pool) = pool(true, 1);
    for _ in 0..10 {
        // As many wait as if the provider were far away.
        pool.clear();
        pool.shared.state().depth = MAX_DEPTH;
        pool.take().unwrap();
        until(&pool, |state| state.calls == 0);
    }
    let state = pool.shared.state();
    assert!(state.ready.len() <= 10, "{}", state.ready.len());
    drop(state);
    assert!(provider.calls().generate < 10 * 11, "{}", provider.calls().generate);
}

#[test]
fn a_key_that_is_too_old_serves_no_file() {
    for files_per_data_key in [1, 3] {
        let (provider, pool) = pool_with(true, files_per_data_key, SHORT);
        pool.take().unwrap();
        until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
        let ready = Arc::clone(&pool.shared.state().ready[0].data_key);
        age(&pool, SHORT.max_age);
        pool.sweep();
        assert_eq!(Arc::strong_count(&ready), 1, "it is wiped");
        provider.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
        assert!(pool.take_ready().is_none());
        assert_eq!(pool.take().err().as_ref().and_then(kind), Some(ProviderErrorKind::KeyUnusable));
    }
}

#[test]
fn an_old_key_does_while_the_provider_is_silent_and_no_longer() {
    let limits = KeyLimits { stale_grace: Duration::from_secs(20), ..SHORT };
    let (provider, pool) = pool_with(true, 1, limits);
    pool.take().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    age(&pool, limits.max_age);
    provider.always(Answer::Fail(ProviderErrorKind::Unavailable));
    assert!(pool.take_ready().is_none());
    assert!(pool.take().is_ok());
    until(&pool, |state| state.calls == 0);
    age(&pool, limits.stale_grace);
    assert_eq!(pool.take().err().as_ref().and_then(kind), Some(ProviderErrorKind::Unavailable));
    assert!(pool.shared.state().stale.is_empty());
}

#[test]
fn a_refusal_of_the_wrapping_key_ends_what_it_has_made() {
    let (provider, pool) = pool(true, 1);
    let taken = pool.take().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    let other = Record { key_id: b"other".to_vec(), ..taken.records[0].clone() };
    pool.forget_made_by(&other);
    assert_eq!(pool.read().ready, FIRST_DEPTH as u64);
    pool.forget_made_by(&taken.records[0]);
    assert_eq!(pool.read().ready, 0);
    pool.take().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    provider.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
    while pool.read().ready > FIRST_DEPTH as u64 / 4 {
        pool.take_ready().unwrap();
    }
    until(&pool, |state| state.calls == 0);
    assert!(pool.take_ready().is_none(), "the first call that is refused says it for all");
}

#[test]
fn behind_a_shut_gate_nobody_waits_and_nothing_is_asked() {
    let (provider, pool) = pool(true, 1);
    provider.hold();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.take());
        provider.until_waiting(1);
        pool.shared.gate.shut();
        pool.clear();
        assert!(matches!(waiting.join().unwrap(), Err(KeyError::Locked)), "before the provider has answered");
    });
    let before = provider.calls().generate;
    provider.release();
    until(&pool, |state| state.calls == 0);
    assert!(matches!(pool.take(), Err(KeyError::Locked)));
    let threads = || Arc::strong_count(&pool.shared) - 1;
    until(&pool, |state| state.idle == threads());
    assert!((pool.read().ready, pool.read().calls) == (0, 0));
    // Those that were being started when the gate was shut may have got to the provider, and no others.
    assert!(provider.calls().generate <= before + FIRST_DEPTH as u64, "{}", provider.calls().generate);
    pool.shared.gate.open();
    assert!(pool.take().is_ok());
}

#[test]
fn keys_are_made_when_few_are_left() {
    let (provider, pool) = pool(true, 1);
    pool.take().unwrap();
    // Every thread waits for work: one that has just made a key looks by itself whether another is missing.
    let threads = || Arc::strong_count(&pool.shared) - 1;
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0 && state.idle == threads());
    for left in (FIRST_DEPTH / 4 + 1..FIRST_DEPTH).rev() {
        pool.take_ready().unwrap();
        let state = pool.shared.state();
        assert_eq!((state.ready.len(), state.calls), (left, 0));
    }
    let before = provider.calls().generate;
    pool.take_ready().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    assert_eq!(provider.calls().generate, before + FIRST_DEPTH as u64 / 4 * 3);
}

#[test]
fn a_thread_that_has_made_a_key_makes_the_next_one_too() {
    let (_, pool) = pool(true, 1);
    for _ in 0..20 {
        pool.take().unwrap();
        until(&pool, |state| state.ready.len() > FIRST_DEPTH / 4 && state.calls == 0);
    }
    let state = pool.shared.state();
    assert!(state.idle <= FIRST_DEPTH + 2 && state.given.is_empty(), "{} idle", state.idle);
}

#[test]
fn many_keys_are_made_by_one_thread_and_who_waits_gets_the_first() {
    let (provider, pool) = pool(true, 1);
    provider.make_many_at_once();
    provider.hold();
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| pool.take().is_ok());
        provider.until_waiting(1);
        assert_eq!(pool.read().calls, FIRST_DEPTH as u64 + 1);
        provider.release();
        assert!(taken.join().unwrap());
    });
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0 && state.idle == 1);
    assert_eq!(provider.calls().generate, FIRST_DEPTH as u64 + 1);
}

#[test]
fn what_is_throttled_among_many_is_made_again_and_nobody_is_told() {
    let (provider, pool) = pool(true, 1);
    provider.make_many_at_once();
    (0..=FIRST_DEPTH).for_each(|_| provider.then(Answer::Fail(ProviderErrorKind::Throttled)));
    assert!(pool.take().is_ok());
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    assert_eq!(provider.calls().generate, 2 * (FIRST_DEPTH as u64 + 1));
}

#[test]
fn a_failure_of_many_reaches_those_who_wait() {
    let (provider, pool) = pool(true, 1);
    provider.make_many_at_once();
    provider.always(Answer::Fail(ProviderErrorKind::Denied));
    assert_eq!(pool.take().err().as_ref().and_then(kind), Some(ProviderErrorKind::Denied));
    until(&pool, |state| state.calls == 0);
    assert_eq!(provider.calls().generate, FIRST_DEPTH as u64 + 1, "and it is not asked again");
}

#[test]
fn a_failure_reaches_those_who_wait_and_no_later_ones() {
    let (provider, pool) = pool(true, 1);
    provider.always(Answer::Fail(ProviderErrorKind::Denied));
    assert_eq!(pool.take().err().as_ref().and_then(kind), Some(ProviderErrorKind::Denied));
    until(&pool, |state| state.calls == 0);
    provider.always(Answer::Right);
    assert!(pool.take().is_ok());
}

#[test]
fn what_is_ready_is_wiped_and_what_was_asked_for_before_is_not_kept() {
    let (provider, pool) = pool(true, 1);
    let taken = pool.take().unwrap();
    until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
    let ready = Arc::clone(&pool.shared.state().ready[0].data_key);
    provider.hold();
    assert!((0..FIRST_DEPTH / 4 * 3).all(|_| pool.take_ready().is_some()));
    provider.until_waiting(1);
    pool.clear();
    assert_eq!((Arc::strong_count(&taken.data_key), Arc::strong_count(&ready)), (1, 1));
    provider.release();
    until(&pool, |state| state.calls == 0);
    assert!(pool.shared.state().ready.is_empty());
}
