//! Data keys made ahead, with a scripted provider.

use super::*;
use crate::keys::providers::scripted::{Answer, ScriptedProvider};

fn pool(remote: bool, files_per_data_key: u32) -> (Arc<ScriptedProvider>, Pool) {
    let provider = Arc::new(ScriptedProvider::new("k", remote));
    let mint = Arc::new(Mint::for_tests(provider.clone()));
    (provider, Pool::new(mint, files_per_data_key))
}

fn until(pool: &Pool, holds: impl Fn(&State) -> bool) {
    let start = Instant::now();
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
    until(&pool, |state| state.ready.len() == 2 * FIRST_DEPTH && state.calls == 0);
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
    assert_eq!(pool.take().err().unwrap().kind, ProviderErrorKind::Denied);
    until(&pool, |state| state.calls == 0);
    assert_eq!(provider.calls().generate, FIRST_DEPTH as u64 + 1, "and it is not asked again");
}

#[test]
fn a_failure_reaches_those_who_wait_and_no_later_ones() {
    let (provider, pool) = pool(true, 1);
    provider.always(Answer::Fail(ProviderErrorKind::Denied));
    assert_eq!(pool.take().err().unwrap().kind, ProviderErrorKind::Denied);
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
